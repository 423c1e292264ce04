"""Linear layers whose weight stays packed, or is multiplied in eight bits, and low-rank branches beside a weight.

Loading puts a ``PackedLinear`` where a network was built with ``nn.Linear``, so no network knows of file formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.fp8 import scale_kind
from ...kernels.fp8_linear import fp8_linear
from ...kernels.packed import unpack
from ...kernels.quantized import Quantized

# what is computed in them stays in them
_WIDE = (torch.float32, torch.float64)


def is_factor(format: str, dtype: torch.dtype, scale: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a packed weight [out, in] is a factor of an eight-bit product as it is.

    It is in e4m3 with one scale for all of it or for each row, or cast. dtype: of its data. scale: the shape of its scale.
    """
    if dtype != torch.float8_e4m3fn:
        return False
    return format == "fp8_cast" or (format == "fp8" and scale_kind(scale, shape) in ("tensor", "row"))


class PackedWeight(nn.Module):
    """A weight [out, in] in the blocks and scales of its file; its parts are buffers, by role.

    is_factor: whether it is a factor of an eight-bit product as it is.
    """

    def __init__(self, format: str, shape: Sequence[int], parts: Mapping[str, Tensor]):
        super().__init__()
        self.format, self.shape = format, tuple(shape)
        for role, tensor in parts.items():
            self.register_buffer(role, tensor)
        # asked at every use
        scale = parts["scale"].shape if "scale" in parts else ()
        self.is_factor = is_factor(format, parts["data"].dtype, scale, self.shape)

    @property
    def parts(self) -> dict[str, Tensor]:
        return dict(self._buffers)  # type: ignore[arg-type]

    def unpack(self, dtype: torch.dtype) -> Tensor:
        return unpack(self.format, self.parts, self.shape, dtype)

    def factor(self) -> Quantized:
        """The weight as a factor of an eight-bit product, for one that is such a factor."""
        data, scale = self._buffers["data"], self._buffers.get("scale")
        assert data is not None
        if scale is None:
            return Quantized(data, torch.ones((1, 1), device=data.device))
        return Quantized(data, scale.float().reshape(-1, 1))


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

    Exactly one of ``weight`` and ``packed`` is set. A packed weight is unpacked to the input's dtype at every use, or,
    with ``eight_bit``, multiplied as it is where its format allows that and the input is in sixteen bits.
    """

    def __init__(
        self,
        weight: nn.Parameter | None,
        packed: PackedWeight | None,
        bias: nn.Parameter | None,
        *,
        eight_bit: bool = False,
    ):
        super().__init__()
        self.eight_bit = eight_bit
        self.weight = weight
        self.packed = packed
        self.bias = bias
        self.branches: nn.ModuleList | None = None

    @property
    def in_eight_bits(self) -> bool:
        """Whether inputs in sixteen bits are multiplied in eight."""
        packed = self.packed if self.eight_bit else None
        return packed is not None and packed.is_factor

    @property
    def reads_rows(self) -> bool:
        """Whether ``forward`` needs no more of such inputs than their rows in eight bits, each with its own scale."""
        return self.in_eight_bits and self._input_scale is None and not self.branches

    def of_rows(self, rows: Quantized, dtype: torch.dtype) -> Tensor:
        """The output [..., out] in ``dtype`` for an input [..., in] of which only rows in eight bits are there.

        Where ``reads_rows``.
        """
        return self._multiplied(rows, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out] in x's dtype."""
        if self.in_eight_bits and x.dtype not in _WIDE:
            y = self._multiplied(x, x.dtype)
        else:
            weight = self.weight if self.packed is None else self.packed.unpack(x.dtype)
            assert weight is not None
            y = F.linear(x, weight, self.bias)
        for branch in self.branches or ():
            y = branch(y, x)
        return y

    def _multiplied(self, x: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
        assert self.packed is not None
        return fp8_linear(x, self.packed.factor(), self.bias, dtype, self._input_scale)

    @property
    def _input_scale(self) -> Tensor | None:
        """The scale that the file gives for all inputs."""
        packed = self.packed
        scale = None if packed is None else packed._buffers.get("input_scale")
        return None if scale is None else scale.float()


def put(module: nn.Module, name: str, child: nn.Module) -> None:
    """Set the submodule of that dotted name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, nn.ModuleList | nn.Sequential):
        owner[int(leaf)] = child
    else:
        setattr(owner, leaf, child)
