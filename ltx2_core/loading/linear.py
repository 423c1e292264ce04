"""Linear layers whose weight stays packed, and low-rank branches beside a weight.

Loading puts a ``PackedLinear`` where a network was built with ``nn.Linear``, so no network knows of file formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.packed import unpack


class PackedWeight(nn.Module):
    """A weight [out, in] in the blocks and scales of its file; its parts are buffers, by role."""

    def __init__(self, format: str, shape: Sequence[int], parts: Mapping[str, Tensor]):
        super().__init__()
        self.format, self.shape = format, tuple(shape)
        for role, tensor in parts.items():
            self.register_buffer(role, tensor)

    @property
    def parts(self) -> dict[str, Tensor]:
        return dict(self._buffers)  # type: ignore[arg-type]

    def unpack(self, dtype: torch.dtype) -> Tensor:
        return unpack(self.format, self.parts, self.shape, dtype)


class LowRank(nn.Module):
    """One LoRA beside a weight: x -> scale * (x a^T) b^T.

    a: [rank, in], b: [out, rank]. unit: alpha/rank. strength: may be changed at any time; scale = strength * unit.
    """

    def __init__(self, a: Tensor, b: Tensor, unit: float):
        super().__init__()
        self.a: Tensor
        self.b: Tensor
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.unit = unit
        self.strength = 0.0

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y plus the branch of x."""
        return torch.add(y, F.linear(F.linear(x, self.a), self.b), alpha=self.strength * self.unit)


class PackedLinear(nn.Module):
    """A linear layer with a plain or packed weight, and optionally low-rank branches.

    Exactly one of ``weight`` and ``packed`` is set. A packed weight is unpacked to the input's dtype at every use.
    """

    def __init__(self, weight: nn.Parameter | None, packed: PackedWeight | None, bias: nn.Parameter | None):
        super().__init__()
        self.weight = weight
        self.packed = packed
        self.bias = bias
        self.branches: nn.ModuleList | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.packed is None else self.packed.unpack(x.dtype)
        assert weight is not None
        y = F.linear(x, weight, self.bias)
        for branch in self.branches or ():
            y = branch(y, x)
        return y


def put(module: nn.Module, name: str, child: nn.Module) -> None:
    """Set the submodule of that dotted name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, nn.ModuleList | nn.Sequential):
        owner[int(leaf)] = child
    else:
        setattr(owner, leaf, child)
