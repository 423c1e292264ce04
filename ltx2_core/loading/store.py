"""What fills one network: the weights of its files, and what LoRAs have made of them.

One routine, ``converge``, brings every weight from the state it is in to the state that a list of LoRAs asks for. Loading
is convergence from nothing, a change of strength is convergence from the last list, and removing all LoRAs gives the
base back bit for bit: every value is computed from the weight as the file has it, never from another merge. A weight that
the network holds in fewer bits than the file is quantised last, whatever was merged into it.

While a network is read for the first time, the list may still change: it is asked for weight by weight, the factors of a
weight are read just before the weight itself, and the difference is formed on the device when both have landed. What was
read too early is made up for at the end. A sum of several LoRAs has the order of the list, whatever came first.

Several processes can share what has to be read (`together.py`): each brings its parts to their state and gives them to the
others. That list is settled before, and what cannot be given, each process does for itself afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...kernels.packed import REPACKABLE, repack, unpack
from .build import Source, check, sources_of
from .changes import NO_CHANGES, Adapters, Changes, changes_by_parameter
from .checkpoint import Checkpoint, TensorInfo
from .linear import LowRank, PackedLinear, put
from .lora.delta import add_deltas, factors
from .lora.finite import FiniteCheck
from .pristine import Pristine, Touched
from .slot import BASE, Slot, State, Value, quantized, slots_of
from .staged import Request, Room, read_staged
from .together import Share, Together
from .while_loading import while_loading

log = logging.getLogger("ltx2.loading")

# memory is pinned piece by piece, so that stopping takes effect soon
_PIECE_BYTES = 1 << 30
_ALIGNMENT = 256
# weights of no more bytes share memory with their neighbours
_SMALL_BYTES = 256 << 10
# factors of that many bytes of weights are read in one go
_GROUP_BYTES = 256 << 20

M = TypeVar("M", bound=nn.Module)
# moves a module to an arena
TakeMemory = Callable[[nn.Module], object]
# whose tensor it is (the number of a change, None for the base), and its role
Part = tuple[int | None, str]


@dataclass(eq=False, slots=True)
class _Task:
    """A weight on its way to a state: what it still has to ask of the files, in how many parts, and what has landed.

    base: its value without changes, once that was asked for.
    """

    slot: Slot
    goal: State
    changes: Changes
    needs: list[Request] = field(default_factory=list)
    parts: int = 0
    landed: dict[Part, Tensor] = field(default_factory=dict)
    base: Value | None = None

    def asked(self) -> list[Request]:
        """The requests, once: they know their task, and a task that knew them too would live until the collector comes."""
        needs, self.needs = self.needs, []
        return needs


@dataclass(frozen=True, eq=False, slots=True)
class _Branches:
    """The low-rank branches of one weight, in use or put aside."""

    sources: tuple[Hashable, ...]
    modules: nn.ModuleList
    tensors: tuple[Tensor, ...]


class WeightStore:
    """Fills a module and keeps track of what its weights hold. All methods belong to one thread at a time.

    module: built on the meta device. sources: a file's weight for every parameter and persistent buffer.
    device: where the network computes, and where its weights go unless they have an arena.
    dtype: of floating-point weights that are not packed. keeps_packed, eight_bit: as in ``slots_of``.
    """

    def __init__(
        self,
        module: nn.Module,
        sources: Sequence[Source],
        *,
        device: torch.device,
        dtype: torch.dtype,
        keeps_packed: Callable[[str], bool] = lambda name: False,
        eight_bit: Callable[[str], bool] = lambda name: False,
    ):
        self.module, self.device, self.dtype = module, device, dtype
        self.pristine = Pristine()
        self._branches: dict[str, _Branches] = {}
        self._check = FiniteCheck()
        self._slots = slots_of(module, sources, keeps_packed, eight_bit)
        # by the name of every module that they are in
        self._inside: dict[str, list[Slot]] = {}
        owned: dict[str, list[Slot]] = {}
        for slot in self._slots:
            owned.setdefault(slot.owner_name, []).append(slot)
        for owner, slots in owned.items():
            for name in (owner, *_modules_around(owner)):
                self._inside.setdefault(name, []).extend(slots)
        self._names = {id(part): name for name, part in module.named_modules()}
        self._homes: dict[Slot, tuple[nn.Module, TakeMemory]] = {}

    @property
    def complete(self) -> bool:
        """Whether every weight has been read."""
        return all(slot.state is not None for slot in self._slots)

    def full_bytes(self, part: nn.Module | None = None) -> int:
        """Bytes of the network, or of a part of it, when it is complete."""
        return sum(slot.nbytes(self.dtype) for slot in (self._slots if part is None else self._slots_in(part)))

    def bytes_on(self, device: torch.device) -> int:
        """Bytes held on a device, with what is kept for the way back. May be asked while another thread converges."""
        held = {id(t): t for slot in self._slots for t in slot.value().values()}
        held |= {id(t): t for t in self.pristine.tensors()}
        held |= {id(t): t for branches in list(self._branches.values()) for t in branches.tensors}
        return sum(t.nbytes for t in held.values() if t.device == device)

    def give_memory(self, part: nn.Module, take: TakeMemory) -> None:
        """Have ``take`` move a part of the network to an arena, where its weights have their places from now on."""
        slots = self._slots_in(part)
        for slot in slots:
            slot.give_dtype(self.dtype)
            self._homes.pop(slot, None)
        take(part)
        for slot in slots:
            slot.part = part

    def give_memory_later(self, part: nn.Module, take: TakeMemory) -> None:
        """``give_memory`` when the first weight of a part is about to be read."""
        self._homes.update((slot, (part, take)) for slot in self._slots_in(part))

    def touched(self, adapters: Adapters) -> Touched:
        """The weights that LoRAs change."""
        changes = changes_by_parameter(adapters)
        slots = [slot for slot in self._slots if slot.name in changes]
        return Touched(
            sum(slot.nbytes(self.dtype) for slot in slots),
            sum(slot.source.weight.size_bytes for slot in slots),
            all(changes[slot.name].low_rank for slot in slots),
        )

    def expected_bytes(self, adapters: Adapters) -> int:
        """How many bytes of files ``converge`` will read to reach the state of a list."""
        return sum(need.info.size_bytes for task in self._tasks(adapters) for need in task.asked())

    def forget(self) -> None:
        """Give up what is kept for the way back and not in use."""
        self.pristine.drop()
        used = {slot.name for slot in self._slots if slot.state is not None and slot.state.beside}
        self._branches = {name: branch for name, branch in self._branches.items() if name in used}

    def keep_in(self, memory: Callable[[int], Tensor], stopped: Callable[[], bool]) -> None:
        """Read the bases of merged weights into host memory, so that the way back needs no file.

        memory: makes flat uint8 memory of a size, pinned where that is possible.
        """
        merged = [slot for slot in self._slots if slot.state is not None and slot.state.merged]
        for slots in _pieces([slot for slot in merged if not self.pristine.has(slot.name)]):
            if stopped():
                return
            infos: dict[Hashable, TensorInfo] = {
                (slot.name, role): info for slot in slots for role, info in slot.source.weight.parts.items()
            }
            places = _carved(infos, memory)
            requests = [
                Request(slot.source.file, infos[slot.name, role], (slot.name, role))
                for slot in slots
                for role in slot.source.weight.parts
            ]
            self._read_into(places, requests, stopped)
            for slot in slots:
                parts = {role: places[slot.name, role] for role in slot.source.weight.parts}
                self.pristine.keep_stored(slot.name, parts)

    @staticmethod
    def _read_into(places: Mapping[Hashable, Tensor], requests: Sequence[Request], stopped: Callable[[], bool]) -> None:
        def place(request: Request) -> Tensor:
            return places[request.tag]

        for _ in read_staged(requests, device="cpu", allocate=place, stopped=stopped):
            pass

    @while_loading
    def converge(
        self,
        wanted: Callable[[], Adapters],
        *,
        overlap: bool = True,
        share: Share | None = None,
        on_bytes: Callable[[int], None] | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> Adapters:
        """Bring every weight to the state that ``wanted()`` asks for; returns the list that was reached.

        overlap: read LoRAs while the base is read; off, they are read after it, with the same bits. share: of a reading
        that processes with the same ``together.plan`` share; it is closed, and Interrupted raised where another has left. Raises
        CheckpointError for files that cannot be read and LoraError for factors that are no numbers. Each weight is then
        in its old or its new state, and a later call goes on from there.
        """
        # weights are normal tensors also where the caller infers: inference tensors cannot be updated in place later
        with torch.inference_mode(False), torch.no_grad():
            return self._converge(wanted, overlap, share, on_bytes=on_bytes, stopped=stopped)

    def _converge(self, wanted: Callable[[], Adapters], overlap: bool, share: Share | None, **watch: Any) -> Adapters:
        def run(tasks: Iterable[_Task]) -> None:
            self._run(tasks, **watch)

        if share is None:
            run(self._first_reading(wanted if overlap else tuple))
        else:
            Together(self, share, wanted() if overlap or self.complete else ()).read(**watch)
        while True:
            adapters = wanted()
            tasks = list(self._tasks(adapters))
            if not tasks:
                self._check.finish()
                return adapters
            try:
                # what is in memory already needs no reading, and frees what it replaces
                for task in tasks:
                    if not task.needs:
                        self._arrive(task)
                run(task for task in tasks if task.needs)
            finally:
                for task in tasks:
                    task.asked()

    def _first_reading(self, wanted: Callable[[], Adapters]) -> Iterator[_Task]:
        asked: Adapters | None = None
        changes: Mapping[str, Changes] = {}
        for slot in self._slots:
            if slot in self._homes:
                self.give_memory(*self._homes[slot])
            if slot.state is None:
                adapters = wanted()
                if adapters is not asked:
                    asked, changes = adapters, changes_by_parameter(adapters)
                yield self._task(slot, changes.get(slot.name, NO_CHANGES))

    def _tasks(self, adapters: Adapters) -> Iterator[_Task]:
        """What has to be done to reach the state of a list."""
        changes = changes_by_parameter(adapters)
        for slot in self._slots:
            ours = changes.get(slot.name, NO_CHANGES)
            if slot.state is None or self._goal(slot, ours) != slot.state:
                yield self._task(slot, ours)

    def _run(self, tasks: Iterable[_Task], arrived: Callable[[Slot], None] = lambda slot: None, **watch: Any) -> None:
        for request, tensor in read_staged(_requests(tasks), device=self.device, allocate=self._memory, **watch):
            task, number, role = request.tag
            task.landed[number, role] = tensor
            if number is not None:
                self._check.note(request.file, request.info, tensor)
            if len(task.landed) == task.parts:
                self._arrive(task)
                arrived(task.slot)

    # deciding ---------------------------------------------------------------------------------------------------------

    def _goal(self, slot: Slot, changes: Changes) -> State:
        if changes is NO_CHANGES:
            return BASE
        cannot_merge = slot.packed and slot.format not in REPACKABLE
        beside = changes.low_rank and (cannot_merge or self.pristine.policy == "side")
        return State(beside=changes.key) if beside else State(merged=changes.key)

    def _task(self, slot: Slot, changes: Changes) -> _Task:
        task = _Task(slot, self._goal(slot, changes), changes)
        if self._needs_factors(task):
            for number, change in enumerate(changes.items):
                for role, info in change.infos.items():
                    task.needs.append(Request(change.file.checkpoint, info, (task, number, role), shared=True))
        if self._needs_base(task):
            for role, info in slot.source.weight.parts.items():
                # what is merged does not stay where it is read
                shared = info.size_bytes <= _SMALL_BYTES or bool(task.goal.merged)
                task.needs.append(Request(slot.source.file, info, (task, None, role), shared))
        task.parts = len(task.needs)
        return task

    def _needs_base(self, task: _Task) -> bool:
        name, goal, state = task.slot.name, task.goal.merged, task.slot.state
        if state is None:
            return True
        if task.slot.quantized and self._is_new(task) and not self.pristine.has_stored(name):
            # what was quantised is no base of another merge
            return True
        return bool(state.merged) and state.merged != goal and not self.pristine.has(name)

    def _is_new(self, task: _Task) -> bool:
        """Whether the goal is a merge that the network neither holds nor keeps."""
        goal, state = task.goal.merged, task.slot.state
        held = state is not None and state.merged == goal
        return bool(goal) and not held and not self.pristine.has_merged(task.slot.name, goal)

    def _needs_factors(self, task: _Task) -> bool:
        if task.goal.beside:
            branches = self._branches.get(task.slot.name)
            return branches is None or branches.sources != task.changes.sources
        return self._is_new(task)

    def _memory(self, request: Request) -> Room | None:
        """The place of a weight whose bytes can be read there as they are."""
        task, number, role = request.tag
        slot = task.slot
        if number is not None or slot.part is None or task.goal.merged or slot.source.weight.offset:
            return None
        if slot.format != slot.source.weight.format:
            return None
        room = slot.room(role)
        return room if room is not None and room.tensor.dtype == request.info.torch_dtype else None

    # landing ----------------------------------------------------------------------------------------------------------

    def _arrive(self, task: _Task) -> None:
        slot, goal, before = task.slot, task.goal, task.slot.state
        if before is None or before.merged != goal.merged:
            pair = self.pristine.policy == "pair"
            if goal.merged:
                value = self.pristine.take_merged(slot.name, goal.merged) or self._merge(task)
                if pair and self.pristine.base(slot.name) is None:
                    self.pristine.keep(slot.name, slot.apart(self._base(task)))
            else:
                value = self._base(task)
                if pair and before is not None:
                    self.pristine.put_aside(slot.name, before.merged, slot.apart(slot.value()))
            slot.set(value)
            if not goal.merged:
                # the network holds it itself
                self.pristine.drop_base(slot.name)
        if goal.beside or (before is not None and before.beside):
            self._set_branches(task)
        slot.state, task.base = goal, None
        task.landed.clear()

    def _stored(self, task: _Task) -> Value:
        """The parts of the weight as the file has them, read or kept; empty where there are none."""
        landed = {role: tensor for (number, role), tensor in task.landed.items() if number is None}
        return landed or self.pristine.stored(task.slot.name, self.device) or {}

    def _base(self, task: _Task) -> Value:
        """The weight without changes, in the form in which the network holds it."""
        if task.base is None:
            task.base = self._new_base(task)
        return task.base

    def _new_base(self, task: _Task) -> Value:
        slot, weight = task.slot, task.slot.source.weight
        kept = slot.value() if slot.state is not None and not slot.state.merged else self.pristine.base(slot.name)
        if kept is not None:
            return kept
        stored = self._stored(task)
        if slot.quantized:
            return quantized(stored["data"])
        if slot.packed:
            return stored
        if weight.format == "plain":
            data = stored["data"]
        else:
            data = unpack(weight.format, stored, weight.shape, torch.float32 if weight.offset else self.dtype)
        data = data + weight.offset if weight.offset else data
        is_final = data.dtype == self.dtype or not data.is_floating_point()
        return {"data": data if is_final else data.to(self.dtype)}

    def _merge(self, task: _Task) -> Value:
        slot, weight = task.slot, task.slot.source.weight
        parity = task.changes.parity
        parts = [
            (change.layer, {role: task.landed[number, role] for role in change.infos}, change.strength)
            for number, change in enumerate(task.changes.items)
        ]
        if slot.quantized:
            return quantized(add_deltas(self._stored(task)["data"], parts, parity=parity))
        # streamed blocks lie in host memory, what changes them lands on the device
        base = {
            role: part if part.device == self.device else part.to(self.device, non_blocking=True)
            for role, part in self._base(task).items()
        }
        if not slot.packed:
            data = base["data"]
            out = self._place(task, data)
            return {"data": add_deltas(data, parts, parity=parity, dtype=data.dtype, out=out)}
        unpacked = unpack(weight.format, base, weight.shape, torch.float32)
        merged = add_deltas(unpacked, parts)
        if weight.format in REPACKABLE:
            return repack(weight.format, merged, base, name=weight.name)
        return {"dense": merged.to(self.dtype)}

    def _place(self, task: _Task, like: Tensor) -> Tensor | None:
        """Where a weight that is read for the first time will stay, if a value like this one can be made there."""
        room = task.slot.room("data") if task.slot.state is None else None
        if room is None or (room.tensor.device, room.tensor.dtype) != (like.device, like.dtype):
            return None
        return room.tensor

    def _set_branches(self, task: _Task) -> None:
        slot, items = task.slot, task.changes.items
        linear = self._with_branches(slot)
        if not task.goal.beside:
            linear.branches = None
            return
        if any(number is not None for number, _ in task.landed):
            modules = self._new_branches(task)
            self._branches[slot.name] = _Branches(task.changes.sources, modules, tuple(modules.buffers()))
        linear.branches = self._branches[slot.name].modules
        for branch, change in zip(linear.branches, items, strict=True):
            assert isinstance(branch, LowRank)
            branch.strength = change.strength

    def _with_branches(self, slot: Slot) -> PackedLinear:
        """The linear layer that holds a weight, as one that can have branches."""
        linear = slot.owner
        if isinstance(linear, PackedLinear):
            return linear
        assert isinstance(linear, nn.Linear)
        assert isinstance(linear.weight, nn.Parameter)
        new = PackedLinear(linear.weight, None, linear.bias)
        put(self.module, slot.owner_name, new)
        for other in self._inside[slot.owner_name]:
            other.owner = new
        return new

    def _new_branches(self, task: _Task) -> nn.ModuleList:
        branches = nn.ModuleList()
        for number, change in enumerate(task.changes.items):
            a, b, unit = factors(change.layer, {role: task.landed[number, role] for role in change.infos})
            branches.append(LowRank(a.to(self.dtype), b.to(self.dtype), unit))
        return branches

    def _slots_in(self, part: nn.Module) -> list[Slot]:
        return self._inside[self._names[id(part)]]


def _modules_around(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def _requests(tasks: Iterable[_Task]) -> Iterator[Request]:
    """What tasks need, so many at a time that long pieces of every file are read together; factors before weights."""
    group: list[Request] = []
    size = 0
    for task in tasks:
        needs = task.asked()
        group += needs
        size += sum(request.info.size_bytes for request in needs)
        if size >= _GROUP_BYTES:
            yield from sorted(group, key=_factors_first)
            group, size = [], 0
    yield from sorted(group, key=_factors_first)


def _factors_first(request: Request) -> tuple[bool, int, int]:
    return request.tag[1] is None, id(request.file), request.info.begin


def _pieces(slots: Iterable[Slot]) -> Iterator[list[Slot]]:
    """Slots in groups of about ``_PIECE_BYTES`` of their files."""
    group: list[Slot] = []
    for slot in slots:
        group.append(slot)
        if sum(one.source.weight.size_bytes for one in group) >= _PIECE_BYTES:
            yield group
            group = []
    if group:
        yield group


def _carved(infos: Mapping[Hashable, TensorInfo], memory: Callable[[int], Tensor]) -> dict[Hashable, Tensor]:
    """A tensor for each, side by side in one piece of memory."""
    ends = list(accumulate(-(-info.size_bytes // _ALIGNMENT) * _ALIGNMENT for info in infos.values()))
    piece = memory(ends[-1])
    return {
        key: piece[start : start + info.size_bytes].view(info.torch_dtype).view(info.torch_shape)
        for start, (key, info) in zip([0, *ends], infos.items(), strict=False)
    }


def load_component(
    module: M,
    files: Checkpoint | Sequence[Checkpoint],
    component: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    adapters: Adapters = (),
    on_bytes: Callable[[int], None] | None = None,
) -> M:
    """Fill a module that was built on the meta device from one file, or from several that hold it together.

    All floating tensors get ``dtype`` (the transformer's F32 tables too: the reference rounds them at use); packed ones
    are unpacked. The module is returned frozen and in inference behaviour. Raises before any data is read when the
    headers do not fit; see ``check`` and ``WeightStore.converge`` for the errors.
    """
    files = (files,) if isinstance(files, Checkpoint) else files
    check(module, files, component)
    store = WeightStore(module, sources_of(files, component), device=torch.device(device), dtype=dtype)
    store.converge(lambda: adapters, on_bytes=on_bytes)
    return frozen(module)


def frozen(module: M) -> M:
    """The module for inference. AssertionError when it has a tensor that no file could fill."""
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, f"{type(module).__name__} has tensors that no file can fill: {left}"
    return module.requires_grad_(False).train(False)
