"""How far a fused kernel may be from its definition, and whether it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .quantized import Quantized

_E4M3 = torch.finfo(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Contract:
    """At most a ``share`` of the elements differs, each by at most ``units`` in the last place.

    A unit is that of the largest value in the element's row (last axis), because what differs by one unit before a
    shift is added may nearly cancel with it. Beside the share a few elements may differ, since tensors may be small. In
    float32 and wider, where every element may differ, 16 units of the largest value are allowed; with a share of 0 all
    bits must agree in every dtype. NaN and infinities must be at the same places.
    """

    units: int
    share: float

    def difference(self, want: Any, got: Any) -> str | None:
        """What is wrong with ``got``, in words, or None. Results may be nested in tuples. Waits for the device."""
        wanted, found = list(_leaves(want)), list(_leaves(got))
        if len(wanted) != len(found):
            return f"{len(found)} results instead of {len(wanted)}"
        for a, b in zip(wanted, found, strict=True):
            wrong = self._quantized(a, b) if isinstance(a, Quantized) else self._tensor(a, b)
            if wrong is not None:
                return wrong
        return None

    def _tensor(self, want: Tensor, got: Tensor) -> str | None:
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            return f"{got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
        special = ~want.isfinite()
        if not torch.equal(want[special].nan_to_num(), got[special].nan_to_num()) or not torch.equal(
            special, ~got.isfinite()
        ):
            return "NaN or infinity at other places"
        if not want.numel():
            return None
        a, b = (t.double().masked_fill(special, 0.0) for t in (want, got))
        off = (a - b).abs()
        count, unit = int((off > 0).sum()), torch.finfo(want.dtype).eps
        if want.dtype in (torch.float32, torch.float64) and self.share:
            largest = float(off.max() / (a.abs().max() * unit).clamp_min(torch.finfo(torch.float64).tiny))
            return None if largest <= 16 else f"{largest:.0f} units of the largest value"
        largest = float((off / (a.abs().amax(-1, keepdim=True) * unit).clamp_min(1e-300)).max())
        allowed = self.share * want.numel() + (4 if self.share else 0)
        if count <= allowed and largest <= self.units:
            return None
        return f"{count} of {want.numel()} elements differ, by up to {largest:.2g} units"

    def _quantized(self, want: Quantized, got: Quantized) -> str | None:
        """Of what ``_tensor`` allows, before it is rounded to eight bits.

        Near zero a step is far smaller than a unit of the row's largest value, so one unit there may be many steps. A row
        whose largest value differs counts as one element, though its scale moves a part of its numbers by a step: up to an
        eighth, as a unit is at most an eighth of a step.
        """
        unit = self.units * torch.finfo(torch.bfloat16).eps
        apart = (want.scale / got.scale - 1).abs().nan_to_num()
        if not torch.equal(want.scale.isnan(), got.scale.isnan()) or float(apart.max()) > unit:
            return "other scales"
        nan = torch.isnan(want.data.float()) & torch.isnan(got.data.float())
        differs = (_ordered(want.data) != _ordered(got.data)) & ~nan
        total, count = differs.numel(), int(differs.sum())
        if not count:
            return None
        moved = apart.gt(0).expand(differs.shape)
        rows, touched, held = int((apart > 0).sum()), int((differs & moved).sum()), int(moved.sum())
        if not self.share or rows + count - touched > self.share * total + 4 or touched > held / 4 + 4:
            return f"{count} of {total} eight-bit numbers differ, {touched} of them in {rows} rows of other scales"
        (a, a_step), (b, b_step) = (_numbers(quantized, differs) for quantized in (want, got))
        largest = _E4M3.max * want.scale.expand(differs.shape)[differs].double()
        excess = float(((a - b).abs() / (unit * largest + (a_step + b_step) / 2)).max())
        if excess <= 1.001:
            return None
        return f"{count} of {total} eight-bit numbers differ, by up to {excess:.2g} times what is allowed"


# same bits: no sum in another order, no function of another library
EXACT = Contract(units=0, share=0.0)
# sums and functions of another library: measured 3e-6 of elements, one unit, which two further roundings can double
CLOSE = Contract(units=2, share=1e-4)

# where one sum decides about many elements: a mean that rounds to its neighbour changes a whole pixel, the quotient of two
# deviations touches everything that lies next to the middle between two numbers. A missing rounding changes 20 percent
SHARED = Contract(units=2, share=5e-3)


def _ordered(data: Tensor) -> Tensor:
    """Eight-bit floats as integers in the order of their values, neighbours one apart."""
    bits = data.view(torch.uint8).to(torch.int32)
    return torch.where(bits >= 128, 128 - bits, bits)


def _numbers(quantized: Quantized, where: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers at these places, and how far their eight-bit neighbours are."""
    scale = quantized.scale.expand(where.shape)[where].double()
    data = quantized.data.float()[where].double()
    _, exponent = torch.frexp(data.abs().clamp_min(_E4M3.tiny))
    return data * scale, scale * _E4M3.eps * torch.exp2(exponent - 1.0)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value
