"""A rank among those that make one clip: what they agree on, over a channel of short words beside that of the tensors.

Whatever one rank alone can do or fail at (loading, room, encoding pictures) is ``agree``: each does it, then all tell how it
went, and all go on or none does. Between two agreements only gates stop a rank (`parallel/gates.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from ..av import AV
from ..graphs import RunAhead
from ..host import Interrupted
from ..parallel.bands import Bands, deal
from ..parallel.collectives import Control, GroupNeighbours, broadcast, connect, join, leave, neighbours
from ..parallel.context import Collectives, ParallelContext
from ..parallel.gates import Board, Gates
from ..parallel.groups import PassGroups, Topology
from ..parallel.topology import LINK_SPEED, StageWork, choose_topology, name
from ..parallel.worker_process import REPEATABLE, Job
from ..parallel.worker_process import Seat as WorkerSeat
from ..ranks import Ranks, Seat
from ..sampling.denoise import Evaluate
from ..sampling.guidance import GuidancePass
from .link_speed import measured_link_speed
from .worker_host import WorkerHost

log = logging.getLogger("ltx2.engine")

T = TypeVar("T")

# whoever waits longer than the parent allows is ended by it, and nobody else knows how long loading may take
_WORDS_TIMEOUT = timedelta(days=2)
_TENSORS_TIMEOUT = timedelta(minutes=30)
# blocks that wait on the device beside the one that runs
_BLOCKS_AHEAD = 4
# of an error's text in a word; the rank itself tells the parent all of it
_MAX_TEXT = 300


class Team(Ranks):
    """All ranks of a generation, as one of them sees them."""

    def __init__(self, seat: WorkerSeat, device: torch.device, host: WorkerHost) -> None:
        """Returns when all ranks are there."""
        self.rank, self.size = seat.rank, seat.size
        self._device, self._host = device, host
        on_gpu = device.type == "cuda"
        join(
            seat.rank,
            seat.size,
            seat.group_folder / "store",
            backend="nccl" if on_gpu else "gloo",
            timeout=_TENSORS_TIMEOUT,
            device=device if on_gpu else None,
        )
        self._control = Control(_WORDS_TIMEOUT)
        self._board = Board(seat.group_folder / "gates", seat.size)
        self._neighbours: GroupNeighbours | None = None
        self._connected: dict[Topology, tuple[ParallelContext, PassGroups]] = {}
        self._link_speed = LINK_SPEED
        # what all ranks have heard of, so that nothing more is said of it; and that with which they can go on
        self._told_error: BaseException | None = None
        self.agreed_error: BaseException | None = None
        if on_gpu:
            own = measured_link_speed(self._connect(Topology(1, seat.size))[0], device)
            self._link_speed = float(self.least(int(own)) or 1)
            log.info("ranks exchange %.0f GB/s each", self._link_speed / 1e9)

    def forget(self) -> None:
        """Let go of what ended the last job."""
        self._told_error = self.agreed_error = None

    def close(self) -> None:
        leave()

    # agreements -------------------------------------------------------------------------------------------------------

    def agree(self, work: Callable[[], T]) -> T:
        try:
            result = work()
        except BaseException as error:
            if error is not self._told_error:
                self._tell_and_raise(_Word.of(error), error)
            raise
        self._tell_and_raise(_Word())
        return result

    def least(self, number: int | None) -> int | None:
        words = self._tell_and_raise(_Word(number=number))
        return min((word.number for word in words if word.number is not None), default=None)

    def _tell_and_raise(self, mine: _Word, error: BaseException | None = None) -> list[_Word]:
        """The words of all ranks. Raises on all of them when one tells of an error: its own there, ``Interrupted`` elsewhere."""
        words = [_Word.read(word) for word in self._control.exchange(mine.to_bytes())]
        if all(word.kind == "fine" for word in words):
            return words
        if error is None:
            where = ", ".join(f"rank {rank}: {word.text}" for rank, word in enumerate(words) if word.kind != "fine")
            error = Interrupted(f"given up by all ranks: {where}")
        self._told_error = error
        # after an error that may be repeated, all ranks are as they were
        if all(word.kind != "broken" for word in words):
            self.agreed_error = error
        raise error

    # stages -----------------------------------------------------------------------------------------------------------

    def topology(self, work: StageWork, passes: Sequence[GuidancePass], wanted: str, *, batched: bool) -> Topology:
        if batched:
            log.info("topology 1x%d: all passes are one evaluation", self.size)
            return Topology(1, self.size)
        choice = choose_topology(replace(work, link_speed=self._link_speed), passes, self.size, wanted)
        log.info("topology %s (groups x ranks of a group): %s", name(choice.topology), choice.reason)
        return choice.topology

    @contextmanager
    def sampling(self, topology: Topology) -> Iterator[Seat]:
        parallel, groups = self._connect(topology)
        gates = Gates(
            self._board, self.rank, topology, self._job.request.job, self._job.interrupted, self._pace(topology)
        )
        if groups.collectives is not None:
            groups = PassGroups(groups.own, groups.count, _Gated(groups.collectives, gates))
        with self._host.deaf():
            try:
                yield Seat(gates.before_block, parallel, groups, self._settled)
            except Interrupted as stop:
                # gates stop all ranks
                self.agreed_error = stop
                raise

    @contextmanager
    def decoding(self, rows: int) -> Iterator[tuple[Bands, Callable[[], None]]]:
        together = Topology(1, self.size)
        gates = Gates(
            self._board, self.rank, together, self._job.request.job, self._job.interrupted, self._pace(together)
        )
        if self._neighbours is None:
            self._neighbours = neighbours(self._device)
        with self._host.deaf():
            try:
                yield Bands(self.rank, deal(rows, self.size), self._neighbours), gates.before_block
            except Interrupted as stop:
                self.agreed_error = stop
                raise

    @property
    def _job(self) -> Job:
        return self._host.job

    def _connect(self, topology: Topology) -> tuple[ParallelContext, PassGroups]:
        """All ranks choose alike, so they make the groups of a topology together."""
        if topology not in self._connected:
            self._connected[topology] = connect(self.rank, topology)
        return self._connected[topology]

    def _pace(self, topology: Topology) -> Callable[[], None]:
        """What keeps the host near the device, so that a stop is soon one of the device too."""
        # passes of single ranks are captured, which brings its own
        if self._device.type != "cuda" or topology.ulysses == 1:
            return lambda: None
        ahead = RunAhead(_BLOCKS_AHEAD, lambda: torch.cuda.current_stream(self._device).record_event())

        def pace() -> None:
            ahead.wait(lambda: None)
            ahead.enqueued()

        return pace

    def _settled(self, evaluate: Evaluate) -> Evaluate:
        """The predictions of rank 0 where each rank has computed all by itself: sound, and a picture that is not shared."""

        def settled(x: AV[Tensor], sigma: float, enabled: AV[bool]) -> Sequence[AV[Tensor]]:
            velocities = evaluate(x, sigma, enabled)

            def of_rank_0(_: Tensor, *passes: Tensor) -> Tensor:
                together = torch.stack(passes)
                broadcast(together)
                return together

            parts = x.map(of_rank_0, *velocities)
            return [parts.map(lambda passes, index=index: passes[index]) for index in range(len(velocities))]

        return settled


@dataclass(frozen=True)
class _Gated:
    """Exchanges between groups, each behind a gate."""

    inner: Collectives
    gates: Gates

    def all_to_all(self, x: Tensor) -> Tensor:
        self.gates.before_exchange()
        return self.inner.all_to_all(x)

    def all_gather(self, x: Tensor) -> Tensor:
        self.gates.before_exchange()
        return self.inner.all_gather(x)


@dataclass(frozen=True)
class _Word:
    """How something went on one rank: fine, stopped, failed in a way that may be repeated, or broken."""

    kind: str = "fine"
    text: str = ""
    number: int | None = None

    @classmethod
    def of(cls, error: BaseException) -> _Word:
        if isinstance(error, Interrupted):
            return cls("stopped", "stopped")
        kind = "failed" if isinstance(error, REPEATABLE) else "broken"
        return cls(kind, f"{type(error).__name__}: {error}"[:_MAX_TEXT])

    def to_bytes(self) -> bytes:
        return json.dumps([self.kind, self.text, self.number]).encode()

    @classmethod
    def read(cls, data: bytes) -> _Word:
        return cls(*json.loads(data.decode()))
