"""One network of an engine: on disk until it is used, then on its device, in whole or streamed through it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .background import Background
from .host import HostOutOfMemory, Interrupted, host
from .loading.build import Source
from .loading.changes import Adapters
from .loading.pinned import PinnedMemory
from .loading.pristine import choose_policy
from .loading.store import WeightStore, frozen
from .memory_plan import SLOTS
from .memory_sizes import RESERVE_BYTES, Stack
from .streaming import Arena, BlockStream

log = logging.getLogger("ltx2.engine")

M = TypeVar("M", bound=nn.Module)

# progress is counted in units that are small next to a second of reading
_PROGRESS_UNIT = 1 << 20


@dataclass(frozen=True)
class NetworkFiles(Generic[M]):
    """How a network comes into being.

    build: makes the module on the meta device. sources: the weights that fill it. finish: gives the filled module what no
    file holds. keeps_packed: which packed linears stay packed. blocks: the parts that may be streamed, which run one
    after another; none in small networks.
    """

    build: Callable[[], M]
    sources: Sequence[Source]
    finish: Callable[[Any], None] = lambda module: None
    keeps_packed: Callable[[str], bool] = lambda name: False
    blocks: Callable[[Any], Sequence[nn.Module]] = lambda module: ()


class Component(Generic[M]):
    """A network and its place in memory; the host sees it as a resident.

    label: what messages call it. limit: the most bytes of the device that weights and work may take; None leaves it to
    the host. overlap: whether LoRAs are read while the network is.
    """

    def __init__(
        self,
        label: str,
        files: NetworkFiles[M],
        *,
        device: str,
        dtype: torch.dtype,
        limit: int | None = None,
        overlap: bool = True,
    ):
        self.label, self.device, self.overlap = label, device, overlap
        self._files, self._dtype, self._limit = files, dtype, limit
        self._store: WeightStore | None = None
        self._arenas: dict[int, Arena] = {}
        self._stream: BlockStream | None = None
        self._loading: Background[Adapters] | None = None
        self._keeping: Background[None] | None = None
        self._kept: list[PinnedMemory] = []
        self._wanted: Adapters = ()
        # the LoRAs that the weights hold; None as long as the network is not complete
        self._reached: Adapters | None = None

    # using ------------------------------------------------------------------------------------------------------------

    def use(self, work_bytes: int, adapters: Adapters = (), *, streamed: int | None = None) -> M:
        """The network with these LoRAs, ready on its device, and room for ``work_bytes`` of activations beside it.

        streamed: how many blocks are streamed; None streams those that do not fit. Raises
        HostOutOfMemory when not even that is possible, and the errors of loading. The network may be used until the next
        call, or until the host asks for its memory.
        """
        if self._loading is not None:
            self.want(adapters)
            self._join()
        streamed = self._admit(work_bytes, streamed)
        if self._reached != adapters or streamed != len(self._arenas):
            self._converge(streamed, work_bytes, adapters)
        assert self._store is not None
        return self._store.module  # type: ignore[return-value]

    def rest(self) -> None:
        """Give back what only a running network needs: the slots of streamed blocks."""
        if self._stream is not None:
            self._stream.release()

    def start(self, spare_bytes: int, *, after: Component | None = None) -> None:
        """Begin to read in the background, unless the network and ``spare_bytes`` would not fit at once.

        after: a component whose reading goes first.
        """
        free, needed = host().free_bytes(self.device), self.full_bytes + spare_bytes
        fits = (free is None or needed <= free) and (self._limit is None or needed <= self._limit)
        if self._loading is None and self._reached is None and fits:
            host().admit(self, self.device, self.full_bytes, 0)
            self._begin(after)

    def want(self, adapters: Adapters) -> None:
        """Tell a reading that has begun with which LoRAs the network will be used."""
        if self._loading is not None:
            self._choose_policy(adapters, 0)
            self._wanted = adapters

    # the host's side --------------------------------------------------------------------------------------------------

    @property
    def pending_bytes(self) -> int:
        """What a reading in the background has still to take of the device."""
        return 0 if self._loading is None else max(self.full_bytes - self.bytes_on(self.device), 0)

    def bytes_on(self, device: str) -> int:
        if self._store is None:
            return 0
        slots = self._stream.device_bytes if self._stream is not None and device == self.device else 0
        return self._store.bytes_on(torch.device(device)) + slots

    def release(self, device: str, wanted: int | None) -> int:
        """Give up what is kept to undo LoRAs, and if that is not enough the weights; the next use reads them again."""
        before = self.bytes_on(device)
        self.rest()
        if before and self._store is not None:
            if self._loading is None and (wanted is None or before - self.bytes_on(device) < wanted):
                self._stop_keeping()
                self._store.forget()
            if wanted is None or before - self.bytes_on(device) < wanted:
                self._drop()
        return before - self.bytes_on(device)

    def close(self) -> None:
        self._drop()
        host().retire(self)

    # sizes ------------------------------------------------------------------------------------------------------------

    @cached_property
    def full_bytes(self) -> int:
        """Bytes of the whole network."""
        return self._the_store().full_bytes()

    @cached_property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of each block that may be streamed."""
        store = self._the_store()
        return tuple(store.full_bytes(block) for block in self._files.blocks(store.module))

    def device_bytes(self, streamed: int) -> int:
        """Bytes of weights and slots on the device when so many blocks are streamed."""
        if not streamed:
            return self.full_bytes
        blocks = [self.block_bytes[number] for number in _spread(streamed, len(self.block_bytes))]
        return self.full_bytes - sum(blocks) + min(SLOTS, streamed) * max(blocks)

    @property
    def stack(self) -> Stack:
        """The sizes that a memory plan needs."""
        blocks = self.block_bytes
        return Stack(self.full_bytes - sum(blocks), max(blocks, default=0), len(blocks))

    @property
    def bits(self) -> float:
        """Bits of a weight in the network's files, on average."""
        elements = sum(source.elements for source in self._files.sources)
        return 8 * sum(source.weight.size_bytes for source in self._files.sources) / max(elements, 1)

    # placing ----------------------------------------------------------------------------------------------------------

    def _admit(self, work_bytes: int, streamed: int | None) -> int:
        """Make room with the host; returns how many blocks are streamed."""
        kept = self._kept_bytes()
        if streamed is None and self._limit is None:
            try:
                host().admit(self, self.device, self.full_bytes + kept, work_bytes)
                return 0
            except HostOutOfMemory:
                if not self.block_bytes or self.device == "cpu":
                    raise
        if streamed is None:
            free = host().free_bytes(self.device) or 0
            room = free + self.bytes_on(self.device) if self._limit is None else self._limit
            streamed = self._fewest_streamed(room - work_bytes - RESERVE_BYTES)
        host().admit(self, self.device, self.device_bytes(streamed) + (0 if streamed else kept), work_bytes)
        return streamed

    def _kept_bytes(self) -> int:
        """Bytes on the device beside the network: bases and merged weights that are not in use, branches."""
        if self._reached is None:
            return 0
        return max(self.bytes_on(self.device) - self.device_bytes(len(self._arenas)), 0)

    def _fewest_streamed(self, room: int) -> int:
        """How many blocks have to be streamed for the weights to fit; all of them where even that does not suffice."""
        counts = range(len(self.block_bytes) + 1)
        return next((count for count in counts if self.device_bytes(count) <= room), len(self.block_bytes))

    def _choose_policy(self, adapters: Adapters, work_bytes: int) -> None:
        store = self._store
        if not adapters or store is None or store.pristine.policy is not None:
            return
        touched, low_rank = store.touched(adapters)
        free = host().free_bytes(self.device)
        if free is not None and self._limit is not None:
            free = min(free, self._limit - self.bytes_on(self.device))
        policy = choose_policy(
            touched,
            work_bytes,
            device_free=None if free is None else free - self.pending_bytes,
            host_free=host().free_bytes("cpu"),
            low_rank=low_rank,
        )
        # what streams is in host memory anyway, and merging costs nothing a step
        store.pristine.policy = "file" if self._arenas and policy in ("pair", "pinned") else policy
        log.info("%s: LoRAs change %.2f GiB, way back: %s", self.label, touched / 2**30, store.pristine.policy)

    def _place(self, streamed: int) -> None:
        """Give so many blocks memory of the host, and take it from the others."""
        assert self._store is not None
        blocks = self._files.blocks(self._store.module)
        numbers = _spread(streamed, len(blocks))
        for number, block in enumerate(blocks):
            streams = number in numbers
            if streams and number not in self._arenas:
                self._store.give_memory(block, Arena.of)
                self._arenas[number] = Arena.of(block)
            elif not streams and number in self._arenas:
                self._store.take_memory(block)
                self._arenas.pop(number).close()

    # reading ----------------------------------------------------------------------------------------------------------

    def _converge(self, streamed: int, work_bytes: int, adapters: Adapters) -> None:
        store = self._the_store()
        self._stop_stream()
        self._stop_keeping()
        self._reached = None
        self._place(streamed)
        self._choose_policy(adapters, work_bytes)
        self._wanted = adapters
        self._begin(None)
        self._join()
        if store.pristine.policy == "pinned":
            self._keep()
        if streamed:
            blocks = self._files.blocks(store.module)
            numbers = sorted(_spread(streamed, len(blocks)))
            self._stream = BlockStream([blocks[number] for number in numbers], device=self.device, slots=SLOTS)

    def _begin(self, after: Component | None) -> None:
        store = self._the_store()
        was_complete = store.complete

        def work(background: Background[Adapters]) -> Adapters:
            reached = store.converge(
                lambda: self._wanted, overlap=self.overlap, on_bytes=background.count, stopped=background.stopped
            )
            if not was_complete:
                self._files.finish(store.module)
                frozen(store.module)
            return reached

        self._loading = Background(
            f"loads {self.label}",
            work,
            device=torch.device(self.device),
            after=None if after is None else after._loading,
            interrupted=host().interrupted,
        )

    def _join(self) -> None:
        """Wait for a reading, with progress. Raises what it raised, and what the user's interrupt raises."""
        assert self._loading is not None
        assert self._store is not None
        loading, total = self._loading, max(1, self._loading_bytes() // _PROGRESS_UNIT)
        try:
            with host().progress(total, f"loading {self.label}") as progress:
                self._reached = loading.result(lambda done: progress.to(min(total, done // _PROGRESS_UNIT)))
                progress.to(total)
        except BaseException as error:
            self._loading = None
            if not self._store.complete:
                self._drop()
                host().retire(self)
            if isinstance(error, Interrupted):
                # the reading may have seen the interrupt before this thread did, which says it in the host's way
                host().check_interrupt()
            raise
        self._loading = None

    def _loading_bytes(self) -> int:
        assert self._loading is not None
        assert self._store is not None
        return self._loading.done_bytes + self._store.expected_bytes(self._wanted)

    def _keep(self) -> None:
        """Read the bases of merged weights into pinned memory, in the background."""
        store = self._store
        assert store is not None

        def pinned(count: int) -> Tensor:
            self._kept.append(PinnedMemory(count))
            return self._kept[-1].memory

        self._keeping = Background(
            f"keeps {self.label}",
            lambda background: store.keep_in(pinned, background.stopped),
            device=torch.device("cpu"),
        )

    def _stop_keeping(self) -> None:
        if self._keeping is not None:
            self._keeping.stop()
            self._keeping = None

    def _stop_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _drop(self) -> None:
        if self._loading is not None:
            self._loading.stop()
            self._loading = None
        self._stop_keeping()
        self._stop_stream()
        # what lies in arenas goes before they are unpinned
        self._store, self._reached = None, None
        for arena in self._arenas.values():
            arena.close()
        for memory in self._kept:
            memory.close()
        self._arenas.clear()
        self._kept.clear()

    def _the_store(self) -> WeightStore:
        """The network as it is, at first without any weight."""
        if self._store is None:
            files = self._files
            self._store = WeightStore(
                files.build(),
                files.sources,
                device=torch.device(self.device),
                dtype=self._dtype,
                keeps_packed=files.keeps_packed,
            )
        return self._store


def _spread(count: int, blocks: int) -> set[int]:
    """Which of so many blocks are streamed: as far apart as possible, so that copies go on while resident ones compute."""
    return {(2 * number + 1) * blocks // (2 * count) for number in range(count)}
