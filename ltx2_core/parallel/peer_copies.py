"""Exchange of tokens and heads by copy engines, straight into memory of the other ranks' GPUs.

NCCL moves tensors with kernels, which compete with the computing beside them. Copy engines do not: values travel while
queries and keys are normed and rotated. Rows go from where they lie to where they belong, so nothing is packed or sorted on
either side, which is two more passes over memory. The more ranks there are, the shorter rows become, and engines are slow with
short ones: then it is better to pack (``packs``), and to send one long piece to every rank.

Every rank has one piece of memory that all others have opened (CUDA IPC): a place for each of queries, keys, values and
results, and a word for each rank (``kernels/meet_triton.py``). Ranks meet behind every exchange. Heads and results take turns,
and a rank computes in one order: so whoever writes into a place has met its owner since that one read what was there before.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .device_memory import HANDLE_BYTES, DriverError, OwnMemory, Rows, close_memory, copy_rows, open_memory, rows_of

if TYPE_CHECKING:
    from .context import Collectives, Split

log = logging.getLogger("ltx2.engine")

PLACES = ("queries", "keys", "values", "results")
_RESULTS = "results"
_WORDS_BYTES = 4096
_ENGINES = 2
# places grow by steps, so that clips of alike sizes share them
_STEP_BYTES = 16 << 20


@dataclass
class _Shared:
    """Memory of all ranks, as this one sees it. bases: its address by rank. place_bytes: of each place."""

    own: OwnMemory
    bases: list[int]
    place_bytes: int
    rank: int
    device: torch.device
    count: Tensor = field(init=False)
    words: Tensor = field(init=False)
    others: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.count = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.words = self.own.bytes[: 4 * len(self.bases)].view(torch.int32)
        self.others = torch.tensor(self.bases, dtype=torch.int64, device=self.device)

    def offset(self, place: str) -> int:
        return _WORDS_BYTES + PLACES.index(place) * self.place_bytes

    def tensor(self, place: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What lies in this rank's own memory."""
        start, count = self.offset(place), torch.Size(shape).numel()
        return self.own.bytes[start : start + count * dtype.itemsize].view(dtype).view(shape)

    def let_go(self) -> None:
        for rank, base in enumerate(self.bases):
            if rank != self.rank:
                close_memory(base, self.device)


class PeerCopies:
    """``context.Copies`` between the GPUs of one host. All ranks of a group make one, and use it alike."""

    def __init__(self, rank: int, collectives: Collectives, device: torch.device) -> None:
        self._rank, self._collectives, self._device = rank, collectives, device
        # a single copy engine does not fill a link
        self._sides = tuple(torch.cuda.Stream(device) for _ in range(_ENGINES))
        self._shared: _Shared | None = None
        self._refused = False
        # whether a rank's heads are brought together before they travel; all ranks alike
        self.packs = False
        # what engines read until the next meeting
        self._packed: list[Tensor] = []

    def carries(self, x: Tensor, split: Split) -> bool:
        """Whether tokens [B, share, W] can go this way, which all ranks answer alike: one sample, and room for it."""
        if self._refused or x.shape[0] != 1:
            return False
        needed = split.share * x.shape[2] * x.element_size()
        if self._shared is None or self._shared.place_bytes < needed:
            # memory cannot be had while a graph is captured, and what ran before has had it
            self._grow(-(-needed // _STEP_BYTES) * _STEP_BYTES)
        return not self._refused

    def heads(self, place: str, x: Tensor, split: Split) -> Tensor:
        """Begin to give every rank its heads of this rank's tokens [1, share, W].

        Returns where all tokens of this rank's heads will be, [1, N, W / P], behind the next meeting.
        """
        shared = self._ready()
        width = x.shape[2] // split.size
        row = width * x.element_size()
        arriving = shared.tensor(place, (split.size * split.share, width), x.dtype)
        valid, first = split.valid, self._rank * split.share
        parts = x[0, :valid].unflatten(1, (split.size, width)).movedim(1, 0)  # [P, valid, width]
        if self.packs:
            parts = _contiguous(parts)
            self._packed.append(parts)
        self._begin()
        for peer in self._peers(split):
            end = Rows(shared.bases[peer] + shared.offset(place) + first * row, row)
            self._send(rows_of(parts[peer]), end, row, valid)
        _copy(arriving[first : first + valid], parts[self._rank])
        return arriving[None, : split.tokens]

    def tokens(self, x: Tensor, split: Split) -> Tensor:
        """The way back: give every rank its tokens of these heads [1, N, W / P]. Returns [1, share, W]; ranks have met then."""
        shared = self._ready()
        width = x.shape[2]
        row = width * x.element_size()
        # of every rank its heads, [P, share, width]: one after the other, or side by side in every token
        if self.packs:
            arriving = shared.tensor(_RESULTS, (split.size, split.share, width), x.dtype)
        else:
            arriving = shared.tensor(_RESULTS, (split.share, split.size, width), x.dtype).movedim(1, 0)
        mine = arriving[self._rank]
        start, pitch = mine.data_ptr() - shared.own.address, mine.stride(0) * x.element_size()
        source = rows_of(x[0])
        self._begin()
        for peer in self._peers(split):
            end = Rows(shared.bases[peer] + start, pitch)
            self._send(source.below(peer * split.share), end, row, split.valid_of(peer))
        first, valid = self._rank * split.share, split.valid
        _copy(mine[:valid], x[0, first : first + valid])
        arriving[:, valid:].zero_()
        self.meet()
        side_by_side = arriving.movedim(0, 1)
        return (_contiguous(side_by_side) if self.packs else side_by_side).flatten(1)[None]

    def meet(self) -> None:
        """Go on, on the current stream, when what all ranks have begun is where it belongs."""
        from ...kernels.meet_triton import meet

        shared = self._ready()
        for side in self._sides:
            torch.cuda.current_stream(self._device).wait_stream(side)
        meet(shared.count, shared.words, shared.others, self._rank)
        self._packed.clear()

    def _ready(self) -> _Shared:
        assert self._shared is not None, "take says whether there is memory"
        return self._shared

    def _begin(self) -> None:
        for side in self._sides:
            side.wait_stream(torch.cuda.current_stream(self._device))

    def _send(self, begin: Rows, end: Rows, width: int, count: int) -> None:
        """Copy so many rows, each engine its part of them."""
        done = 0
        for number, side in enumerate(self._sides, 1):
            upto = count * number // len(self._sides)
            copy_rows(begin.below(done), end.below(done), width, upto - done, side)
            done = upto

    def _peers(self, split: Split) -> list[int]:
        """The others, each rank's next one first: no two begin with the same."""
        return [(self._rank + step) % split.size for step in range(1, split.size)]

    # memory -----------------------------------------------------------------------------------------------------------

    def _grow(self, place_bytes: int) -> None:
        """Have places of that size on all ranks, or on none, for good, and say why."""
        self.close()
        # the driver cannot give what PyTorch keeps for itself
        torch.cuda.empty_cache()
        own, handle, reason = None, b"", ""
        try:
            own = OwnMemory(_WORDS_BYTES + len(PLACES) * place_bytes, self._device)
            handle = own.handle()
        except DriverError as error:
            reason = str(error)
        handles = self._told(handle)
        opened: dict[int, int] = {}
        if all(handles) and own is not None:
            opened[self._rank] = own.address
            try:
                for rank, one in enumerate(handles):
                    if rank not in opened:
                        opened[rank] = open_memory(one, self._device)
            except DriverError as error:
                reason = str(error)
        if all(self._told(b"" if reason else b"opened")) and own is not None:
            bases = [opened[rank] for rank in range(len(handles))]
            self._shared = _Shared(own, bases, place_bytes, self._rank, self._device)
            return
        self._refused = True
        log.info("exchange: through NCCL alone, GPUs cannot copy to each other: %s", reason or "so another rank says")
        for rank, base in opened.items():
            if rank != self._rank:
                close_memory(base, self._device)
        self._told(b"")
        if own is not None:
            own.free()

    def close(self) -> None:
        """Give the memory back, on all ranks."""
        if self._shared is None:
            return
        torch.cuda.synchronize(self._device)
        self._shared.let_go()
        # nobody has it open any more
        self._told(b"")
        self._shared.own.free()
        self._shared = None

    def _told(self, word: bytes) -> list[bytes]:
        """What every rank has to say, of a handle's length; it waits for all of them."""
        mine = torch.frombuffer(bytearray(word.ljust(HANDLE_BYTES, b"\0")), dtype=torch.uint8)
        words = self._collectives.all_gather(mine.to(self._device)).cpu()
        # a handle may end in zeros, so only a word of nothing else is none
        return [bytes(one.tolist()) if bool(one.any()) else b"" for one in words]


def _contiguous(x: Tensor) -> Tensor:
    """A copy with its axes in the order of memory."""
    target = torch.empty_like(x, memory_format=torch.contiguous_format)
    _copy(target, x)
    return target


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy rows by a kernel, which moves as many bytes at a time as an element has."""
    # not for rows that do not begin at, or are not, multiples of so many bytes
    with contextlib.suppress(RuntimeError):
        target, source = (x.view(torch.complex128) for x in (target, source))
    target.copy_(source)
