"""The tensors of a part of a network in one piece of memory: allocated, copied and moved at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .pinned import PinnedMemory, pages

# no load of a GPU wants more
_ALIGNMENT = 256
_ATTRIBUTE = "_ltx2_arena"
# What a linear layer's product reads: of itself, or of a weight that is multiplied in eight bits.
_OF_LINEAR = (("", "weight"), ("", "bias"), ("packed", "data"), ("packed", "scale"))


class _Place(NamedTuple):
    """Where a tensor lies in an arena."""

    offset: int
    size_bytes: int
    dtype: torch.dtype
    shape: torch.Size


class Arena:
    """The tensors of a module in one piece of memory, on a device or on the host.

    memory: flat, uint8. tensors: the module's, views of it. ``point`` makes them views of a copy on any device, ``restore``
    of ``memory`` again: they stay the same objects, so whoever holds them, and ``state_dict``, notice nothing.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, *, pin: bool):
        """Take in tensors from any device; those that cannot become views are replaced by others in ``tensors``."""
        places, end = [], 0
        for tensor in tensors:
            places.append(_Place(end, tensor.nbytes, tensor.dtype, tensor.shape))
            end += _rounded_up(tensor.nbytes, _ALIGNMENT)
        self.layout = tuple(places)
        self.pin = pin
        self._pinned = PinnedMemory(end) if pin else None
        self.memory = _bytes(end, device) if self._pinned is None else self._pinned.memory
        self._home = self.views(self.memory)
        self.tensors = tuple(_taken_in(tensor, view) for tensor, view in zip(tensors, self._home, strict=True))
        self._offsets = {id(tensor): place.offset for tensor, place in zip(self.tensors, places, strict=True)}

    @classmethod
    def of(cls, module: nn.Module, device: torch.device | str = "cpu", *, pin: bool = True) -> Arena:
        """The arena of a module's parameters and buffers on a device; pin: pinned host memory, where there is a GPU.

        The one that the module has, or a new one if that is another kind of memory or the module's tensors are others
        now; the old one is closed. Values are copied; tensors on the meta device become memory without values. Those and
        tensors made in inference mode are replaced, all others stay the same objects. What parts of the module share
        stays shared. Weights of linear layers that a submodule names in ``side_by_side`` (groups of names of its
        children) lie end to end.
        """
        # made as normal tensors, which may be written inside and outside of inference mode
        with torch.inference_mode(False), torch.no_grad():
            named = list(_named(module))
            unique = list({id(tensor): tensor for _, _, tensor in named}.values())
            device = torch.empty(0, device=device).device  # with the number of the current GPU
            pin = pin and device.type == "cpu"
            known = module.__dict__.get(_ATTRIBUTE)
            if known is not None and known.pin == pin and known.memory.device == device and known.holds(unique):
                return known
            arena = module.__dict__[_ATTRIBUTE] = cls(unique, device, pin=pin)
            in_arena = dict(zip(map(id, unique), arena.tensors, strict=True))
            for tensors, name, tensor in named:
                # past the module's own checks, which take longer than all else here
                tensors[name] = in_arena[id(tensor)]
            if known is not None:
                known.close()
            return arena

    @staticmethod
    def last_of(module: nn.Module) -> Arena | None:
        """The arena that a module was moved to last."""
        return module.__dict__.get(_ATTRIBUTE)

    @property
    def size_bytes(self) -> int:
        return self.memory.nbytes

    @property
    def pinned(self) -> bool:
        return self._pinned is not None and self._pinned.pinned

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these very tensors lie in ``memory``, and no others."""
        return [(id(t), t.data_ptr()) for t in tensors] == [
            (id(t), home.data_ptr()) for t, home in zip(self.tensors, self._home, strict=True)
        ]

    def offset(self, tensor: Tensor) -> int | None:
        """Where one of ``tensors`` begins in ``memory``; None for any other tensor."""
        return self._offsets.get(id(tensor))

    def views(self, copy: Tensor) -> tuple[Tensor, ...]:
        """The tensors in a copy of ``memory``: flat, uint8, at least as long."""
        typed = {dtype: copy.view(dtype) for dtype in {place.dtype for place in self.layout}}
        return tuple(view(typed[place.dtype], place.shape, place.offset) for place in self.layout)

    def point(self, views: Sequence[Tensor]) -> None:
        """Make the module's tensors these views."""
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def restore(self) -> None:
        """Make the module's tensors views of ``memory``."""
        self.point(self._home)

    def close(self) -> None:
        """Unpin the memory, from which no copy may be under way; it goes with the last tensor that lies in it."""
        if self._pinned is not None:
            self._pinned.close()


def _named(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """(where its owner has it, name, tensor) of every tensor, in the order in which they lie; shared ones come several
    times."""
    owners = list(module.modules())
    for owner in owners:
        # asked of the class: a module looks long for what it has not
        for group in getattr(type(owner), "side_by_side", ()):
            linears = [owner.get_submodule(name) for name in group]
            for path, name in _OF_LINEAR:
                for linear in linears:
                    holder = linear._modules.get(path) if path else linear
                    for tensors in () if holder is None else (holder._parameters, holder._buffers):
                        tensor = tensors.get(name)
                        if tensor is not None:
                            yield tensors, name, tensor
    for owner in owners:
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield tensors, name, tensor


def view(typed: Tensor, shape: Sequence[int], offset: int) -> Tensor:
    """A contiguous tensor in flat memory of its dtype, from byte ``offset`` on; in one step, as there are thousands."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    start = typed.storage_offset() + offset // typed.itemsize
    return typed.as_strided(shape, strides[::-1][: len(shape)], start)


def _taken_in(tensor: Tensor, view: Tensor) -> Tensor:
    if not tensor.is_meta:
        view.copy_(tensor)
    if tensor.is_meta or tensor.is_inference():
        # neither can be given other data: one stays on its device, the other without a version counter
        # another object than the view, which goes on saying where home is when the tensor is pointed elsewhere
        return nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view.detach()
    tensor.data = view
    return tensor


def _bytes(count: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return pages(count)
    # a normal tensor, which may be written inside and outside of inference mode
    with torch.inference_mode(False):
        return torch.empty(count, dtype=torch.uint8, device=device)


def _rounded_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
