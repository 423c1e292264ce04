"""Reading a network together with other processes: each reads some parts and is given the others.

A part is a block, whose arena is given in one piece, or all that lies outside of blocks. How parts are handed on is for
others to know: this package sees a ``Share``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..host import Interrupted
from .pristine import Pristine
from .slot import Slot, Value

_POLL_SECONDS = 0.02


class Share(Protocol):
    """A process's place in one reading. All processes get theirs at the same time, and each has to close it, however the
    reading ends, or the others would wait for it.

    rank, size: which of how many processes this is.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def offer(self, number: int, owner: int, tensors: Sequence[Tensor]) -> None:
        """The contiguous tensors of a part: with their values at its owner, memory for these elsewhere.

        Returns at once. Parts are given in the order of their numbers, from 0 on, each when all processes have offered it;
        one without tensors is the last.
        """

    def given(self) -> int:
        """How many parts have been given."""

    def wait(self, seconds: float) -> None:
        """Return when another part has been given, or after that time."""

    def over(self) -> bool:
        """Whether no more parts are given, because a process has left."""

    def check(self) -> None:
        """Raise why it is over: Interrupted where another process has left."""

    def close(self) -> None:
        """Leave; before all parts were given this ends the reading everywhere. Returns when no tensor is used any more."""


@dataclass(eq=False, slots=True)
class Part:
    """Weights that one process reads, the ``number``-th to be given."""

    slots: list[Slot]
    size_bytes: int = 0
    number: int = 0
    owner: int = 0


def parts_of(blocks: Mapping[Slot, nn.Module | None], size: int) -> list[Part]:
    """The parts in the order in which reading the weights fills them, with owners that read about as much each.

    blocks: the block of every weight, None outside of blocks, in the order of reading.
    """
    parts: dict[int, Part] = {}
    for slot, block in blocks.items():
        # behind those that are complete before
        part = parts[id(block)] = parts.pop(id(block), None) or Part([])
        part.slots.append(slot)
        part.size_bytes += slot.source.weight.size_bytes
    loads = [0] * size
    for part in sorted(parts.values(), key=lambda part: -part.size_bytes):
        part.owner = loads.index(min(loads))
        loads[part.owner] += part.size_bytes
    for number, part in enumerate(parts.values()):
        part.number = number
    return list(parts.values())


class Together:
    """One process's side of a reading.

    in_pairs: weights that are merged and whose bases are kept beside them, in ``pristine``: both are given.
    """

    def __init__(
        self,
        share: Share,
        blocks: Mapping[Slot, nn.Module | None],
        in_pairs: Collection[Slot],
        pristine: Pristine,
    ):
        self._share, self._in_pairs, self._pristine = share, in_pairs, pristine
        self._parts = parts_of(blocks, share.size)
        self._of = {slot: part for part in self._parts for slot in part.slots}
        # weights that the parts wait for
        self._missing = [len(part.slots) for part in self._parts]
        self._taken = 0

    def is_mine(self, slot: Slot) -> bool:
        """Whether this process reads a weight."""
        return self._of[slot].owner == self._share.rank

    def arrived(self, slot: Slot) -> None:
        """A weight that this process reads has its value."""
        self._is_ready(self._of[slot])

    def expect(self, slot: Slot, device: torch.device, dtype: torch.dtype) -> None:
        """Make memory for a weight that another process reads."""

        def empty() -> Value:
            return {role: torch.empty_like(tensor, device=device) for role, tensor in slot.value().items()}

        if slot.part is None:
            slot.give_dtype(dtype)
            slot.set(empty())
        if slot in self._in_pairs:
            self._pristine.keep(slot.name, empty())
        self._is_ready(self._of[slot])

    def taken(self) -> list[Slot]:
        """The weights of others that were given since the last call."""
        since, self._taken = self._taken, min(self._share.given(), len(self._parts))
        return [slot for part in self._parts[since : self._taken] for slot in part.slots if not self.is_mine(slot)]

    @contextmanager
    def ended_by(self, stopped: Callable[[], bool] | None) -> Iterator[Callable[[], bool]]:
        """Closes the share behind the block, which is handed what tells whether to end early."""
        share = self._share

        def ended() -> bool:
            return share.over() or (stopped is not None and stopped())

        self._ended = ended
        try:
            yield ended
        except Interrupted:
            share.check()
            raise
        finally:
            share.close()
            for part in self._parts[share.given() :]:
                for slot in part.slots:
                    if not self.is_mine(slot):
                        # memory that never got its values
                        self._pristine.drop_base(slot.name)

    def finish(self, watch: Callable[[int], None]) -> None:
        """This process has nothing left to read and no objection: wait for the others. watch: called with 0 meanwhile."""
        # given when all processes have come so far, so the reading has succeeded in all of them or in none
        self._share.offer(len(self._parts), 0, ())
        while self._share.given() <= len(self._parts):
            if self._ended():
                raise Interrupted("reading was stopped")
            self._share.wait(_POLL_SECONDS)
            watch(0)

    def _is_ready(self, part: Part) -> None:
        self._missing[part.number] -= 1
        if not self._missing[part.number]:
            self._share.offer(part.number, part.owner, list(self._tensors(part)))

    def _tensors(self, part: Part) -> Iterator[Tensor]:
        """A block's arena, then what lies outside of one, and the bases of pairs."""
        arena = part.slots[0].arena
        if arena is not None:
            yield arena.memory
        for slot in part.slots:
            for _, tensor in sorted(slot.value().items()):
                if arena is None or arena.offset(tensor) is None:
                    yield tensor.detach()
            base = self._pristine.base(slot.name) if slot in self._in_pairs else {}
            assert base is not None, "it was kept when the merged value came"
            yield from (tensor for _, tensor in sorted(base.items()))
