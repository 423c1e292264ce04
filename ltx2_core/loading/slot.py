"""The places of a network that weights go to."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .build import Source
from .linear import PackedLinear, PackedWeight, put

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

    leaf: its name in the owner. packed: it stays packed, in a PackedLinear. fixed: it has memory of its own, that values
    are copied into. state: None before the weight was read.
    """

    source: Source
    owner: nn.Module
    leaf: str
    packed: bool
    fixed: bool = False
    state: State | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.source.name

    @property
    def owner_name(self) -> str:
        return self.name.rpartition(".")[0]

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that the weight takes, ``dtype`` where it is a plain floating-point one."""
        weight = self.source.weight
        data = weight.parts["data"]
        if self.packed or (weight.format == "plain" and not data.torch_dtype.is_floating_point):
            return weight.size_bytes
        return math.prod(weight.shape) * dtype.itemsize

    def value(self) -> Value:
        """What the network holds: the parts of a packed weight, "dense" for one that was unpacked, else "data"."""
        if not self.packed:
            return {"data": getattr(self.owner, self.leaf)}
        assert isinstance(self.owner, PackedLinear)
        packed, weight = self.owner.packed, self.owner.weight
        if packed is not None:
            return packed.parts
        # neither is there for a moment while another thread replaces one by the other
        return {} if weight is None else {"dense": weight}

    def set(self, value: Value) -> None:
        """Make the network hold a value; one with memory of its own gets a copy."""
        if self.fixed:
            here = self.value()
            if here.keys() == value.keys():
                for role, tensor in value.items():
                    # what was read in place is there already
                    if here[role].data_ptr() != tensor.data_ptr():
                        here[role].copy_(tensor, non_blocking=True)
                return
        if not self.packed:
            set_tensor(self.owner, self.leaf, value["data"])
            return
        assert isinstance(self.owner, PackedLinear)
        weight = self.source.weight
        if "dense" in value:
            self.owner.weight, self.owner.packed = nn.Parameter(value["dense"], requires_grad=False), None
        else:
            self.owner.weight, self.owner.packed = None, PackedWeight(weight.format, weight.shape, value)

    def give_dtype(self, dtype: torch.dtype) -> None:
        """Let a weight that was not read yet have the dtype that it is going to have, still without memory."""
        tensor = self.value().get("data")
        if not self.packed and tensor is not None and tensor.is_meta and tensor.is_floating_point():
            set_tensor(self.owner, self.leaf, tensor.to(dtype))


def slots_of(module: nn.Module, sources: Sequence[Source], keeps_packed: Callable[[str], bool]) -> list[Slot]:
    """A slot for every source, after packed linears were put where the files have packed weights.

    module: on the meta device. keeps_packed: whether a linear's weight of that name stays packed; any other packed weight
    is unpacked when it is read.
    """
    modules = dict(module.named_modules())
    packed = set()
    for source in sources:
        owner_name, _, leaf = source.name.rpartition(".")
        owner = modules[owner_name]
        if (
            source.weight.format != "plain"
            and leaf == "weight"
            and isinstance(owner, nn.Linear)
            and keeps_packed(source.name)
        ):
            parts = {
                role: torch.empty(info.torch_shape, dtype=info.torch_dtype, device="meta")
                for role, info in source.weight.parts.items()
            }
            weight = PackedWeight(source.weight.format, source.weight.shape, parts)
            modules[owner_name] = PackedLinear(None, weight, owner.bias)
            put(module, owner_name, modules[owner_name])
            packed.add(source.name)
    split = [(source, *source.name.rpartition(".")[::2]) for source in sources]
    return [Slot(source, modules[owner], leaf, source.name in packed) for source, owner, leaf in split]


def set_tensor(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Make a tensor the parameter or buffer of that name as it is, without gradients."""
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        setattr(owner, leaf, tensor)
