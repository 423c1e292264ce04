"""A rank among those that make one clip: what they agree on, over a channel of short words beside that of the tensors.

Whatever one rank alone can do or fail at (loading, room, encoding pictures) is ``agree``: each does it, then all tell how it
went (`agreement.py`), and all go on or none does. Between two agreements only gates stop a rank (`parallel/gates.py`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from ..graphs import RunAhead
from ..host import Interrupted
from ..parallel import helix_collectives, helix_topology
from ..parallel.bands import Bands, deal
from ..parallel.collectives import Control, GroupNeighbours, connect, join, leave, neighbours
from ..parallel.context import Collectives, ParallelContext
from ..parallel.exchange_choice import fastest_exchange
from ..parallel.gates import Board, Gates
from ..parallel.groups import PassGroups, Topology
from ..parallel.sharing import Sharing
from ..parallel.topology import LINK_SPEED, StageWork, choose_topology, name
from ..parallel.worker_process import Job
from ..parallel.worker_process import Seat as WorkerSeat
from ..ranks import Ranks, Seat
from ..sampling.guidance import GuidancePass
from ..settled import settled
from .agreement import Agreement
from .link_speed import measured_link_speed
from .worker_host import WorkerHost

log = logging.getLogger("ltx2.engine")

T = TypeVar("T")

# "off" in the environment: every rank reads everything
SHARED_READING = "LTX2_SHARED_READING"

# whoever waits longer than the parent allows is ended by it, and nobody else knows how long loading may take
_WORDS_TIMEOUT = timedelta(days=2)
_TENSORS_TIMEOUT = timedelta(minutes=30)
# blocks that wait on the device beside the one that runs
_BLOCKS_AHEAD = 4


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
        self._agreement = Agreement(Control(_WORDS_TIMEOUT).exchange)
        self._board = Board(seat.group_folder / "gates", seat.size)
        self._readings, self._sharing_board = 0, Board(seat.group_folder / "sharing", seat.size)
        self._neighbours: GroupNeighbours | None = None
        self._connected: dict[Topology, tuple[ParallelContext, PassGroups]] = {}
        self._writers: dict[helix_topology.Topology, helix_topology.Ranks | None] = {}
        self._link_speed = LINK_SPEED
        if on_gpu:
            own = measured_link_speed(self._connect(Topology(1, seat.size))[0], device)
            self._link_speed = float(self.least(int(own)) or 1)
            log.info("ranks exchange %.0f GB/s each", self._link_speed / 1e9)

    @property
    def agreed_error(self) -> BaseException | None:
        """What has ended the job on all ranks, after which they can go on."""
        return self._agreement.agreed

    def forget(self) -> None:
        """Let go of what ended the last job."""
        self._agreement.forget()

    def close(self) -> None:
        leave()

    def agree(self, work: Callable[[], T]) -> T:
        return self._agreement.on(work)

    def least(self, number: int | None) -> int | None:
        return self._agreement.least(number)

    def share(self, plan: Callable[[], int | None], label: str) -> Sharing | None:
        if os.environ.get(SHARED_READING) == "off":
            return None
        plans = self._agreement.numbers(plan())
        if set(plans) == {None}:
            return None
        if len(set(plans)) > 1:
            # one has read it already, streams its blocks, or has another way back from LoRAs
            log.info("every rank reads all of the %s: they do not have the same to read", label)
            return None
        log.info("the ranks share the reading of the %s", label)
        self._readings += 1
        return Sharing(self._sharing_board, self.rank, self._readings, self._device)

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
        gates = self._gates(topology)
        if groups.collectives is not None:
            groups = PassGroups(groups.own, groups.count, _Gated(groups.collectives, gates))
        with self._stopped_by_gates():
            yield Seat(gates.before_block, parallel, groups, settled)

    @contextmanager
    def decoding(self, rows: int) -> Iterator[tuple[Bands, Callable[[], None]]]:
        gates = self._gates(Topology(1, self.size))
        if self._neighbours is None:
            self._neighbours = neighbours(self._device)
        with self._stopped_by_gates():
            yield Bands(self.rank, deal(rows, self.size), self._neighbours), gates.before_block

    def writers(self, topology: helix_topology.Topology) -> helix_topology.Ranks | None:
        """The ranks that write a prompt together; None where this one is none of them."""
        if topology not in self._writers:
            self._writers[topology] = helix_collectives.connect(topology, range(topology.size))
        return self._writers[topology]

    def _gates(self, topology: Topology) -> Gates:
        job = self._job
        return Gates(self._board, self.rank, topology, job.request.job, job.interrupted, self._pace(topology))

    @contextmanager
    def _stopped_by_gates(self) -> Iterator[None]:
        with self._host.deaf():
            try:
                yield
            except Interrupted as stop:
                # the gates have stopped all ranks
                self._agreement.stopped(stop)
                raise

    @property
    def _job(self) -> Job:
        return self._host.job

    def _connect(self, topology: Topology) -> tuple[ParallelContext, PassGroups]:
        """All ranks choose alike, so they make the groups of a topology together."""
        if topology not in self._connected:
            parallel, groups = connect(self.rank, topology)
            self._connected[topology] = fastest_exchange(parallel, self._device), groups
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
