"""The places of a network that weights go to."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from ...kernels.fp8 import pack_fp8
from .arena import Arena
from .build import Source
from .linear import PackedLinear, PackedWeight, is_factor, put
from .ring import Room
from .weights import Weight

Value = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class State:
    """What a weight holds. merged: the key of the changes in its value. beside: that of those in branches beside it."""

    merged: tuple[Hashable, ...] = ()
    beside: tuple[Hashable, ...] = ()


BASE = State()


@dataclass(eq=False, slots=True)
class Slot:
    """One weight of a network: where it comes from, which module holds it, and what it holds.

    leaf: its name in the owner. format: what the network holds, "plain" or a packed format, in a PackedLinear. part: a module around it with an arena, in
    which the weight has its place that values are copied into; None where every value comes with memory. state: None
    before the weight was read.
    """

    source: Source
    owner: nn.Module
    leaf: str
    format: str
    part: nn.Module | None = None
    state: State | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.source.name

    @property
    def owner_name(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def packed(self) -> bool:
        return self.format != "plain"

    @property
    def quantized(self) -> bool:
        """Whether the network holds numbers in eight bits that the file has in more."""
        return self.packed and self.source.weight.format == "plain"

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that the weight takes, ``dtype`` where it is a plain floating-point one."""
        weight = self.source.weight
        data = weight.parts["data"]
        if self.quantized:
            return sum(part.nbytes for part in _quantized_parts(weight.shape).values())
        if self.packed or (weight.format == "plain" and not data.torch_dtype.is_floating_point):
            return weight.size_bytes
        return math.prod(weight.shape) * dtype.itemsize

    def value(self) -> Value:
        """What the network holds: the parts of a packed weight, "dense" for one that was unpacked, else "data"."""
        if not self.packed:
            return {"data": self._plain()}
        assert isinstance(self.owner, PackedLinear)
        packed, weight = self.owner.packed, self.owner.weight
        if packed is not None:
            return packed.parts
        # neither is there for a moment while another thread replaces one by the other
        return {} if weight is None else {"dense": weight}

    def _plain(self) -> Tensor:
        # past the module's own search, which takes long
        tensor = self.owner._parameters.get(self.leaf)
        return getattr(self.owner, self.leaf) if tensor is None else tensor

    @property
    def arena(self) -> Arena | None:
        return None if self.part is None else Arena.last_of(self.part)

    def room(self, role: str) -> Room | None:
        """The place of a part of what the network holds; None for what lies elsewhere."""
        arena, tensor = self.arena, self.value().get(role)
        offset = None if arena is None or tensor is None else arena.offset(tensor)
        return None if arena is None or tensor is None or offset is None else Room(tensor, arena.memory, offset)

    def apart(self, value: Value) -> Value:
        """A value that lasts when the network holds another: what lies in the weight's place is copied."""
        arena = self.arena
        if arena is None:
            return value
        in_place = {role for role, tensor in value.items() if arena.offset(tensor) is not None}
        return {role: tensor.detach().clone() if role in in_place else tensor for role, tensor in value.items()}

    def set(self, value: Value) -> None:
        """Make the network hold a value; a weight that has a place gets a copy."""
        if self.part is not None:
            here = self.value()
            if here.keys() == value.keys():
                for role, tensor in value.items():
                    # what was read in place is there already
                    if here[role] is not tensor:
                        here[role].copy_(tensor, non_blocking=True)
                return
        if not self.packed:
            set_tensor(self.owner, self.leaf, value["data"])
            return
        assert isinstance(self.owner, PackedLinear)
        if "dense" in value:
            self.owner.weight, self.owner.packed = nn.Parameter(value["dense"], requires_grad=False), None
        else:
            self.owner.weight, self.owner.packed = None, PackedWeight(self.format, self.source.weight.shape, value)

    def give_dtype(self, dtype: torch.dtype) -> None:
        """Let a weight that was not read yet have the dtype that it is going to have, still without memory."""
        if self.packed:
            return
        tensor = self._plain()
        if tensor.is_meta and tensor.is_floating_point() and tensor.dtype != dtype:
            set_tensor(self.owner, self.leaf, _without_memory(tensor.shape, dtype).detach())


def slots_of(
    module: nn.Module,
    sources: Sequence[Source],
    keeps_packed: Callable[[str], bool],
    eight_bit: Callable[[str], bool] = lambda name: False,
) -> list[Slot]:
    """A slot for every source, after packed linears were put where weights are packed.

    module: on the meta device. keeps_packed: whether a linear's weight of that name stays packed; any other packed weight
    is unpacked when it is read. eight_bit: whether a linear's weight of that name is multiplied in eight bits: where its
    format allows that it stays as it is, and a plain one is quantised when it is read.
    """
    modules = dict(module.named_modules())
    formats = {}
    for source in sources:
        owner_name, _, leaf = source.name.rpartition(".")
        owner = modules[owner_name]
        if leaf == "weight" and isinstance(owner, nn.Linear):
            weight = _packed(source, keeps_packed(source.name), eight_bit(source.name))
            if weight is not None:
                modules[owner_name] = PackedLinear(None, weight, owner.bias, eight_bit=eight_bit(source.name))
                put(module, owner_name, modules[owner_name])
                formats[source.name] = weight.format
    split = [(source, *source.name.rpartition(".")[::2]) for source in sources]
    return [Slot(source, modules[owner], leaf, formats.get(source.name, "plain")) for source, owner, leaf in split]


def multiplies(weight: Weight) -> bool:
    """Whether the network's form of a linear layer's weight, where that is to be so, is multiplied in eight bits."""
    data, scale = weight.parts["data"], weight.parts.get("scale")
    shape = () if scale is None else scale.torch_shape
    return weight.format == "plain" or is_factor(weight.format, data.torch_dtype, shape, weight.shape)


def quantized(weight: Tensor) -> Value:
    """A weight [out, in] in e4m3 with a float32 scale for each row, rounded to nearest once."""
    data, scale = pack_fp8(weight, _quantized_parts(weight.shape)["scale"])
    return {"data": data, "scale": scale}


def _packed(source: Source, keeps_packed: bool, eight_bit: bool) -> PackedWeight | None:
    """What a linear layer has in place of a plain weight, without memory; None where it has a plain one."""
    weight = source.weight
    if weight.format == "plain":
        return PackedWeight("fp8", weight.shape, _quantized_parts(weight.shape)) if eight_bit else None
    parts = {
        role: torch.empty(info.torch_shape, dtype=info.torch_dtype, device="meta")
        for role, info in weight.parts.items()
    }
    return (
        PackedWeight(weight.format, weight.shape, parts) if keeps_packed or (eight_bit and multiplies(weight)) else None
    )


def _quantized_parts(shape: Sequence[int]) -> Value:
    """The parts of a quantised weight [out, in], without memory."""
    return {
        "data": torch.empty(tuple(shape), dtype=torch.float8_e4m3fn, device="meta"),
        "scale": torch.empty((shape[0], 1), dtype=torch.float32, device="meta"),
    }


@lru_cache(maxsize=256)
def _without_memory(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def set_tensor(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Make a tensor the parameter or buffer of that name as it is, without gradients."""
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        setattr(owner, leaf, tensor)
