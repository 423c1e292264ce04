"""Reading what a network lacks together with other processes: each reads some parts and is given the others.

A part is a block, whose arena is given in one piece, or all that lies outside of blocks. What is given is what its owner has
made of the files: weights cast, quantised and merged with LoRAs, and of a pair the unchanged ones too. Where a LoRA
leaves a weight in another form, or runs beside it, the base is given, and every process does the rest for itself. How parts
are handed on is for others to know: this package sees a ``Share``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ...kernels.packed import REPACKABLE
from ..host import Interrupted
from .changes import NO_CHANGES, Adapters, Changes, changes_by_parameter
from .checkpoint import CheckpointError
from .linear import PackedLinear
from .slot import Slot, State, Value

if TYPE_CHECKING:
    from .store import WeightStore

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


def parts_of(weights: Mapping[Slot, tuple[nn.Module | None, int]], processes: int) -> list[Part]:
    """The parts in the order in which reading the weights fills them, with owners that read about as much each.

    weights: the block of every weight, None outside of blocks, and how many bytes are read for it; in the order of reading.
    """
    parts: dict[int, Part] = {}
    for slot, (block, size) in weights.items():
        # to the end: behind those that are complete before
        part = parts[id(block)] = parts.pop(id(block)) if id(block) in parts else Part([])
        part.slots.append(slot)
        part.size_bytes += size
    loads = [0] * processes
    for part in sorted(parts.values(), key=lambda part: -part.size_bytes):
        part.owner = loads.index(min(loads))
        loads[part.owner] += part.size_bytes
    for number, part in enumerate(parts.values()):
        part.number = number
    return list(parts.values())


def plan(store: WeightStore, adapters: Adapters) -> int | None:
    """A number that is the same for processes that can read what a list of LoRAs asks for together.

    None where nothing has to be read, or nothing that can be given.
    """
    shared = _shared(store, adapters)
    if not shared:
        return None
    told = hashlib.blake2b(digest_size=6)
    told.update(repr((store.dtype, store.pristine.policy, [adapter.parity for adapter in adapters])).encode())
    for slot in store._slots:
        source, kept = slot.source, (store.pristine.base(slot.name) is None, store.pristine.has_stored(slot.name))
        goal = store._goal(slot, shared[slot]) if slot in shared else None
        facts = slot.name, slot.format, source.file.identity, source.weight.size_bytes, slot.state, kept, goal
        told.update(repr(facts).encode())
    return int.from_bytes(told.digest(), "big")


def _shared(store: WeightStore, adapters: Adapters) -> dict[Slot, Changes]:
    """The weights that one process reads for all, and what it does to them."""
    changes = changes_by_parameter(adapters)
    shared = {}
    for slot in store._slots:
        ours = changes.get(slot.name, NO_CHANGES)
        keeps_form = not slot.packed or slot.quantized or slot.format in REPACKABLE
        goal = store._goal(slot, ours)
        if slot.state is None:
            shared[slot] = ours if keeps_form and goal.merged else NO_CHANGES
        elif keeps_form and goal != slot.state and not goal.beside and _has_place(slot) and _reads(store, slot, ours):
            shared[slot] = ours
    return shared


def _reads(store: WeightStore, slot: Slot, changes: Changes) -> bool:
    """Whether files have to be read for a change."""
    return bool(store._task(slot, changes).asked())


def _has_place(slot: Slot) -> bool:
    """Whether a weight stays where it is when it gets another value."""
    return all(slot.room(role) is not None for role in slot.value())


@dataclass(frozen=True, eq=False, slots=True)
class _Coming:
    """A weight that another process reads: what it will be, and the bytes that are read for it."""

    before: State | None
    goal: State
    size_bytes: int


class Together:
    """One process's side of a reading, with the store's own routines for each weight."""

    def __init__(self, store: WeightStore, share: Share, adapters: Adapters):
        self._store, self._share, self._pristine = store, share, store.pristine
        self._changes = _shared(store, adapters)
        weights, self._coming = {}, {}
        for slot, ours in self._changes.items():
            task = store._task(slot, ours)
            size = sum(need.info.size_bytes for need in task.asked())
            weights[slot] = store._homes[slot][0] if slot in store._homes else slot.part, size
            self._coming[slot] = _Coming(slot.state, task.goal, size)
        self._parts = parts_of(weights, share.size)
        self._of = {slot: part for part in self._parts for slot in part.slots}
        # weights that the parts wait for
        self._missing = [len(part.slots) for part in self._parts]
        self._noted = 0
        # weights whose bases are given too, for a pair of which this process has neither
        self._with_base = {slot for slot, coming in self._coming.items() if self._lacks_base(slot, coming)}
        self._on_bytes: Callable[[int], None] = lambda size: None

    def read(self, *, on_bytes: Callable[[int], None] | None = None, stopped: Callable[[], bool] | None = None) -> None:
        """Bring all weights that are shared to their states, and close the share. The arguments are those of ``converge``."""
        share = self._share
        self._on_bytes = on_bytes or self._on_bytes

        def ended() -> bool:
            return share.over() or (stopped is not None and stopped())

        try:
            tasks = (self._store._task(slot, self._changes[slot]) for slot in self._own())
            self._store._run(tasks, self._is_ready, on_bytes=self._count, stopped=ended)
            self._store._check.finish()
            self._finish(ended)
        except Interrupted:
            share.check()
            raise
        except CheckpointError as error:
            # the others may have read theirs well
            error.args = (f"rank {share.rank}: {error}",)
            raise
        finally:
            share.close()
            self._count(0)
            for slot in self._with_base:
                # memory that never got its values
                if not self._is_mine(slot) and self._of[slot].number >= self._noted:
                    self._pristine.drop_base(slot.name)

    def _finish(self, ended: Callable[[], bool]) -> None:
        """This process has nothing left to read and no objection: wait for the others."""
        # given when all processes have come so far, so the reading has succeeded in all of them or in none
        self._share.offer(len(self._parts), 0, ())
        while self._share.given() <= len(self._parts):
            if ended():
                raise Interrupted("reading was stopped")
            self._share.wait(_POLL_SECONDS)
            self._count(0)

    def _own(self) -> Iterator[Slot]:
        """The weights that this process reads; on the way, places for the others."""
        store = self._store
        for slot in self._changes:
            if slot in store._homes:
                store.give_memory(*store._homes[slot])
            if self._is_mine(slot):
                yield slot
            else:
                self._make_way(slot)
                self._is_ready(slot)

    def _is_mine(self, slot: Slot) -> bool:
        return self._of[slot].owner == self._share.rank

    def _lacks_base(self, slot: Slot, coming: _Coming) -> bool:
        is_pair = self._pristine.policy == "pair" and bool(coming.goal.merged)
        return is_pair and self._pristine.base(slot.name) is None and not _holds_base(coming.before)

    def _make_way(self, slot: Slot) -> None:
        """Before another value comes into a weight's place: memory where it has none, and copies of what is to be kept."""
        store, coming = self._store, self._coming[slot]

        def empty() -> Value:
            return {role: torch.empty_like(tensor, device=store.device) for role, tensor in slot.value().items()}

        if coming.before is None and slot.part is None:
            slot.give_dtype(store.dtype)
            slot.set(empty())
        if slot in self._with_base:
            self._pristine.keep(slot.name, empty())
        elif self._pristine.policy == "pair" and coming.before is not None:
            if coming.goal.merged and self._pristine.base(slot.name) is None:
                self._pristine.keep(slot.name, slot.apart(slot.value()))
            elif not coming.goal.merged:
                self._pristine.put_aside(slot.name, coming.before.merged, slot.apart(slot.value()))

    def _is_ready(self, slot: Slot) -> None:
        """A weight has its value, or a place for it."""
        part = self._of[slot]
        self._missing[part.number] -= 1
        if not self._missing[part.number]:
            self._share.offer(part.number, part.owner, list(self._tensors(part)))

    def _tensors(self, part: Part) -> Iterator[Tensor]:
        """A block's arena, then what lies outside of one, and bases."""
        arena = part.slots[0].arena
        if arena is not None:
            yield arena.memory
        for slot in part.slots:
            for _, tensor in sorted(slot.value().items()):
                if arena is None or arena.offset(tensor) is None:
                    yield tensor.detach()
            base = self._pristine.base(slot.name) if slot in self._with_base else {}
            assert base is not None, "it was kept when the merged value came"
            yield from (tensor for _, tensor in sorted(base.items()))

    def _count(self, size: int) -> None:
        """Note what others have given, and tell of the bytes that they and this process have read."""
        since, self._noted = self._noted, min(self._share.given(), len(self._parts))
        for slot in (slot for part in self._parts[since : self._noted] for slot in part.slots):
            if not self._is_mine(slot):
                self._has_come(slot)
                size += self._coming[slot].size_bytes
        if size:
            self._on_bytes(size)

    def _has_come(self, slot: Slot) -> None:
        before, goal = self._coming[slot].before, self._coming[slot].goal
        if not goal.merged:
            # the network holds it itself
            self._pristine.drop_base(slot.name)
        if before is not None and before.beside:
            assert isinstance(slot.owner, PackedLinear), "branches are beside one"
            slot.owner.branches = None
        slot.state = goal


def _holds_base(state: State | None) -> bool:
    return state is not None and not state.merged
