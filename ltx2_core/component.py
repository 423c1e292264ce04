"""One network of an engine: on disk until it is used, then on its device, in whole or streamed through it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .background import Background
from .host import HostOutOfMemory, Interrupted, host
from .loading.arena import Arena
from .loading.build import Source
from .loading.changes import Adapters
from .loading.pinned import PinnedMemory
from .loading.pristine import POLICIES, choose_policy
from .loading.store import WeightStore, frozen
from .loading.together import Share, plan
from .loading.while_loading import while_loading
from .memory_plan import SLOTS
from .memory_sizes import HOST_RESERVE_BYTES, RESERVE_BYTES, Stack, size
from .streaming import BlockStream

log = logging.getLogger("ltx2.engine")

M = TypeVar("M", bound=nn.Module)

# progress is counted in units that are small next to a second of reading
_PROGRESS_UNIT = 1 << 20
_POLL_SECONDS = 0.02

# from what is to be read (None: nothing that can be shared), worked out where others ask for it, and its name to a reading
# shared with them, if it is
MakeShare = Callable[[Callable[[], int | None], str], Share | None]


def _alone(plan: Callable[[], int | None], label: str) -> None:
    """Nobody else reads."""


@dataclass(frozen=True)
class NetworkFiles(Generic[M]):
    """How a network comes into being.

    build: makes the module on the meta device. sources: the weights that fill it. finish: called with the filled module, gives
    it what no file holds. keeps_packed: which packed linears stay packed. eight_bit: which linears are multiplied in eight bits where
    their format allows it. blocks: the parts that may be streamed, which run one after another; none in small networks.
    """

    build: Callable[[], M]
    sources: Sequence[Source]
    finish: Callable[[Any], None] = lambda module: None
    keeps_packed: Callable[[str], bool] = lambda name: False
    eight_bit: Callable[[str], bool] = lambda name: False
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
        # whether others take part in it; the list of LoRAs is settled then
        self._is_shared = False
        self._keeping: Background[None] | None = None
        self._kept: list[PinnedMemory] = []
        self._wanted: Adapters = ()
        # bytes of weights for which the way back from LoRAs was chosen
        self._touched = 0
        self._finished = False
        # the LoRAs that the weights hold; None as long as the network is not complete
        self._reached: Adapters | None = None

    # using ------------------------------------------------------------------------------------------------------------

    @while_loading
    def use(
        self,
        work_bytes: int,
        adapters: Adapters = (),
        *,
        streamed: int | None = None,
        share: MakeShare = _alone,
    ) -> M:
        """The network with these LoRAs, ready on its device, and room for ``work_bytes`` of activations beside it.

        streamed: how many blocks are streamed; None streams those that do not fit. share: asked once, whether or not there
        is anything to read. Raises HostOutOfMemory when not even that is possible, and the errors of loading. The network may be used until the next
        call, or until the host asks for its memory.
        """
        if self._loading is not None:
            self.want(adapters)
            self._join()
        streamed = self._admit(work_bytes, streamed)
        self._place(streamed)
        converges = self._reached != adapters
        if converges:
            self._prepare(work_bytes, adapters)
        shared = share(lambda: self._share_plan(adapters) if converges else None, self.label)
        if converges:
            self._converge(adapters, shared)
        if streamed and self._stream is None:
            self._start_stream()
        assert self._store is not None
        return self._store.module  # type: ignore[return-value]

    def rest(self) -> None:
        """Give back what only a running network needs: the slots of streamed blocks."""
        if self._stream is not None:
            self._stream.release()

    @while_loading
    def start(
        self,
        spare_bytes: int,
        adapters: Adapters = (),
        *,
        after: Component | None = None,
        share: MakeShare = _alone,
    ) -> None:
        """Begin to read in the background, unless the network and ``spare_bytes`` would not fit at once.

        adapters: the LoRAs with which it will probably be used. after: a component whose reading goes first. share: as in
        ``use``.
        """
        free, needed = host().free_bytes(self.device), self.full_bytes + spare_bytes
        fits = (free is None or needed <= free) and (self._limit is None or needed <= self._limit)
        begins = self._loading is None and self._reached is None and fits
        if begins:
            host().admit(self, self.device, self.full_bytes, 0)
            self._choose_policy(adapters, 0)
            self._wanted = adapters
        shared = share(lambda: self._share_plan(adapters) if begins else None, self.label)
        if begins:
            self._begin(after, shared)

    def wait_for_shared(self) -> None:
        """Return when no reading is under way that others take part in, however it has ended."""
        while self._loading is not None and self._is_shared and not self._loading.join(_POLL_SECONDS):
            host().check_interrupt()

    def want(self, adapters: Adapters) -> None:
        """Tell a reading that has begun with which LoRAs the network will be used."""
        if self._loading is not None and not self._is_shared:
            self._choose_policy(adapters, 0)
            self._wanted = adapters

    # the host's side --------------------------------------------------------------------------------------------------

    @property
    def pending_bytes(self) -> int:
        """What a reading in the background has still to take of the device."""
        return 0 if self._loading is None else self.missing_bytes

    def bytes_on(self, device: str) -> int:
        if self._store is None:
            return 0
        slots = self._stream.device_bytes if self._stream is not None and device == self.device else 0
        return self._store.bytes_on(torch.device(device)) + slots

    def release(self, device: str, wanted: int | None) -> int:
        """Give up what is kept to undo LoRAs, and if that is not enough the weights; the next use reads them again."""
        before = self.bytes_on(device)

        def enough() -> bool:
            return wanted is not None and before - self.bytes_on(device) >= wanted

        self.rest()
        if before and self._loading is None and not enough():
            self._forget()
        if (before or self._loading is not None) and not enough():
            self._drop()
        return before - self.bytes_on(device)

    def close(self) -> None:
        self._drop()
        host().retire(self)

    # sizes ------------------------------------------------------------------------------------------------------------

    @property
    def missing_bytes(self) -> int:
        """What the network has still to take of its device."""
        return max(self.device_bytes(len(self._arenas)) - self.bytes_on(self.device), 0)

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
        slots = min(SLOTS, streamed) * max(self._streamed_bytes(streamed), default=0)
        return self._resident_bytes(streamed) + slots

    def _resident_bytes(self, streamed: int) -> int:
        """Without slots. Host memory is the CPU's own, so there it makes no difference what is streamed."""
        return self.full_bytes - (0 if self.device == "cpu" else sum(self._streamed_bytes(streamed)))

    def _streamed_bytes(self, streamed: int) -> list[int]:
        return [self.block_bytes[number] for number in _spread(streamed, len(self.block_bytes))]

    @property
    def stack(self) -> Stack:
        """The sizes that a memory plan needs."""
        blocks = self.block_bytes
        return Stack(self.full_bytes - sum(blocks), max(blocks, default=0), len(blocks))

    @property
    def bits(self) -> float:
        """Bits of a weight of the network, on average."""
        return 8 * self.full_bytes / max(sum(source.elements for source in self._files.sources), 1)

    # placing ----------------------------------------------------------------------------------------------------------

    def _admit(self, work_bytes: int, streamed: int | None) -> int:
        """Make room with the host; returns how many blocks are streamed.

        Where room is short, what is kept to undo LoRAs goes first. Then more blocks are streamed, unless their number is
        given.
        """
        may_stream = streamed is None and bool(self.block_bytes) and self.device != "cpu"
        if streamed is None:
            streamed = self._within_limit(work_bytes) if may_stream and self._limit is not None else 0
        short = self._shortage(streamed, work_bytes)
        if short is not None and self._kept_bytes():
            self._forget()
            short = self._shortage(streamed, work_bytes)
        if short is not None and may_stream:
            room = (host().free_bytes(self.device) or 0) + self.bytes_on(self.device)
            streamed = max(streamed, self._fewest_streamed(room - work_bytes - RESERVE_BYTES))
            short = self._shortage(streamed, work_bytes)
        if short is not None:
            raise short
        return streamed

    def _shortage(self, streamed: int, work_bytes: int) -> HostOutOfMemory | None:
        """Make room for the network with so many blocks streamed; what the host says where there is none."""
        # blocks that leave the device make room too
        self._move(to_host=self._numbers(streamed) - self._arenas.keys())
        try:
            host().admit(self, self.device, self.device_bytes(streamed) + self._kept_bytes(), work_bytes)
        except HostOutOfMemory as error:
            return error.with_traceback(None)
        return None

    def _within_limit(self, work_bytes: int) -> int:
        """How many blocks have to be streamed for the user's limit; what is kept has to go too where it exceeds that."""
        assert self._limit is not None
        room = self._limit - work_bytes - RESERVE_BYTES
        streamed = self._fewest_streamed(room)
        if self.device_bytes(streamed) > room:
            raise HostOutOfMemory(
                f"the {self.label} does not fit into its limit of {size(self._limit)} on {self.device}: it needs "
                f"{size(self.device_bytes(streamed))} for weights, with {streamed} of its blocks streamed, "
                f"{size(work_bytes)} for work, and {size(RESERVE_BYTES)} that stay free. Ways out, cheapest first: 1. a "
                f"higher memory_limit; 2. weights in fp8; 3. fewer frames or a smaller picture"
            )
        if self.device_bytes(streamed) + self._kept_bytes() > room:
            self._forget()
        return streamed

    def _kept_bytes(self) -> int:
        """Bytes on the device beside the network: bases and merged weights that are not in use, branches."""
        slots = 0 if self._stream is None else self._stream.device_bytes
        return max(self.bytes_on(self.device) - slots - self._resident_bytes(len(self._arenas)), 0)

    def _fewest_streamed(self, room: int) -> int:
        """How many blocks have to be streamed for the weights to fit; all of them where even that does not suffice."""
        counts = range(len(self.block_bytes) + 1)
        return next((count for count in counts if self.device_bytes(count) <= room), len(self.block_bytes))

    def _choose_policy(self, adapters: Adapters, work_bytes: int) -> None:
        """Decide about the way back from LoRAs, again where they change more than those before."""
        if not adapters:
            return
        store = self._the_store()
        touched = store.touched(adapters)
        if store.pristine.policy is not None:
            if touched.held_bytes <= self._touched:
                return
            if self._loading is None:
                self._forget()
        free = host().free_bytes(self.device)
        if free is not None and self._limit is not None:
            free = min(free, self._limit - self.bytes_on(self.device))
        policy = choose_policy(
            touched,
            work_bytes,
            device_free=None if free is None else free - self.missing_bytes,
            host_free=host().free_bytes("cpu"),
        )
        self._touched = touched.held_bytes
        # what streams is in host memory anyway, where merging takes no room and costs nothing a step
        store.pristine.policy = "file" if self._arenas else policy
        log.info("LoRAs change %s of the %s: %s", size(touched.held_bytes), self.label, POLICIES[store.pristine.policy])

    def _forget(self) -> None:
        """Give up what is kept to undo LoRAs; the way back is decided anew."""
        self._stop_keeping()
        if self._store is not None:
            self._store.forget()
            self._store.pristine.policy = None
        for memory in self._kept:
            memory.close()
        self._kept.clear()

    def _place(self, streamed: int) -> None:
        """Have so many blocks in host memory, and the others on the device."""
        wanted = self._numbers(streamed)
        self._move(to_host=wanted - self._arenas.keys(), to_device=self._arenas.keys() - wanted)

    def _numbers(self, streamed: int) -> set[int]:
        return _spread(streamed, len(self.block_bytes))

    def _move(self, *, to_host: Collection[int] = (), to_device: Collection[int] = ()) -> None:
        """Move blocks between the device and arenas in host memory."""
        if not to_host and not to_device:
            return
        self._check_host_memory(sum(self.block_bytes[number] for number in to_host))
        self._stop_stream()
        # what is kept lies where the blocks were
        self._forget()
        store = self._the_store()
        blocks = self._files.blocks(store.module)
        for number in to_host:
            store.give_memory(blocks[number], Arena.of)
            self._arenas[number] = Arena.of(blocks[number])
        for number in to_device:
            store.give_memory(blocks[number], _on(store.device))
            del self._arenas[number]

    def _check_host_memory(self, needed: int) -> None:
        free = host().free_bytes("cpu")
        if self.device != "cpu" and needed and free is not None and free < needed + HOST_RESERVE_BYTES:
            raise HostOutOfMemory(
                f"the {self.label} does not fit on {self.device}, and {size(needed)} of it would be streamed from host "
                f"memory, of which {size(free)} are free and {size(HOST_RESERVE_BYTES)} are kept so. Ways out, cheapest "
                f"first: 1. weights in fp8; 2. fewer frames or a smaller picture; 3. end other programs"
            )

    # reading ----------------------------------------------------------------------------------------------------------

    def _prepare(self, work_bytes: int, adapters: Adapters) -> None:
        self._stop_stream()
        self._stop_keeping()
        self._reached = None
        self._choose_policy(adapters, work_bytes)
        self._wanted = adapters

    def _share_plan(self, adapters: Adapters) -> int | None:
        """What all ranks have to have in common to share a reading; None where this one cannot."""
        store = self._the_store()
        # blocks in host memory are this rank's alone
        return None if self._arenas else plan(store, adapters if self.overlap or store.complete else ())

    def _converge(self, adapters: Adapters, shared: Share | None) -> None:
        self._begin(None, shared)
        self._join()
        if self._reached is None:
            raise Interrupted(f"{self.label}: reading was stopped")
        if self._the_store().pristine.policy == "pinned":
            self._keep()

    def _start_stream(self) -> None:
        store = self._the_store()
        # branches that are put aside would hold on to the arenas in which they were
        store.forget()
        blocks = self._files.blocks(store.module)
        for number in self._arenas:
            # with the branches that a LoRA has put beside its weights
            self._arenas[number] = Arena.of(blocks[number])
        self._stream = BlockStream([blocks[number] for number in sorted(self._arenas)], device=self.device, slots=SLOTS)

    def _begin(self, after: Component | None, shared: Share | None) -> None:
        store = self._the_store()
        self._is_shared = shared is not None

        def work(background: Background[Adapters]) -> Adapters:
            reached = store.converge(
                lambda: self._wanted,
                overlap=self.overlap,
                share=shared,
                on_bytes=background.count,
                stopped=background.stopped,
            )
            if not self._finished:
                self._files.finish(store.module)
                frozen(store.module)
                self._finished = True
            return reached

        self._loading = Background(
            f"changing the LoRAs of the {self.label}" if store.complete else f"loading {self.label}",
            work,
            device=torch.device(self.device),
            after=None if after is None else after._loading,
            interrupted=host().interrupted,
            # also where the reading never began: the others wait for this rank
            ended=lambda: None if shared is None else shared.close(),
        )

    def _join(self) -> None:
        """Wait for a reading, with progress. Raises what it raised, and what the user's interrupt raises.

        Leaves ``_reached`` None where an interrupt of an earlier run, of which the host knows nothing any more, had ended
        the reading.
        """
        assert self._loading is not None
        assert self._store is not None
        loading, total = self._loading, max(1, self._loading_bytes() // _PROGRESS_UNIT)
        try:
            with host().progress(total, f"{loading.name}, MiB") as progress:
                self._reached = loading.result(lambda done: progress.to(min(total, done // _PROGRESS_UNIT)))
                progress.to(total)
        except BaseException as error:
            self._loading = None
            if not self._store.complete:
                self._drop()
                host().retire(self)
            if not (loading.was_interrupted and isinstance(error, Interrupted)):
                raise
        self._loading = None
        if loading.was_interrupted:
            # the reading may have seen the interrupt before this thread did, which says it in the host's way
            host().check_interrupt()

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

        def keep(background: Background[None]) -> None:
            try:
                store.keep_in(pinned, background.stopped)
            except Exception as error:
                log.warning("the weights of the %s are not kept in host memory: %s", self.label, error)

        self._keeping = Background(f"keeping {self.label}", keep, device=torch.device("cpu"))

    def _stop_keeping(self) -> None:
        if self._keeping is None:
            return
        self._keeping.stop()
        self._keeping = None
        # what was being filled when it was stopped
        used = {_memory(tensor) for tensor in self._store.pristine.tensors()} if self._store is not None else set()
        for unused in [one for one in self._kept if _memory(one.memory) not in used]:
            unused.close()
            self._kept.remove(unused)

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
        self._store, self._reached, self._wanted, self._finished = None, None, (), False
        for arena in self._arenas.values():
            arena.close()
        for memory in self._kept:
            memory.close()
        self._arenas.clear()
        self._kept.clear()

    @while_loading
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
                eight_bit=files.eight_bit,
            )
            for block in files.blocks(self._store.module):
                self._store.give_memory_later(block, _on(self._store.device))
        return self._store


def _on(device: torch.device) -> Callable[[nn.Module], Arena]:
    return partial(Arena.of, device=device, pin=False)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _spread(count: int, blocks: int) -> set[int]:
    """Which of so many blocks are streamed: as far apart as possible, so that copies go on while resident ones compute."""
    return {(2 * number + 1) * blocks // (2 * count) for number in range(count)}
