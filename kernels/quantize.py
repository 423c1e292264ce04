"""Rows of activations in eight-bit floating point, each with a scale of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import CLOSE, EXACT
from .dispatch import demand, operation
from .quantized import Quantized

LARGEST = 448.0
SMALLEST_SCALE = 1e-12
WIDEST = 32768
_SAMPLE = 256
# in plain torch so many numbers at a time, since it takes several float32 copies of them
_ELEMENTS = 1 << 22


def _twin_of_quantize() -> Callable:
    from .quantize_triton import quantize_rows

    return quantize_rows


def _twin_of_gelu() -> Callable:
    from .quantize_triton import gelu_quantize

    return gelu_quantize


def _fit(x: Tensor, scale: Tensor | None = None, *, fast: bool = False) -> Hashable:
    demand(x.dim() > 0 and x.numel() > 0, "empty")
    demand(x.shape[-1] <= WIDEST, "shape")
    demand(x.is_contiguous(), "rows not contiguous")
    if scale is not None:
        demand(scale.dtype == torch.float32 and scale.numel() == 1, "scale of the input")
        demand(scale.device == x.device, "mixed devices")
    return x.shape[-1], scale is None


def _sample(x: Tensor, scale: Tensor | None = None, *, fast: bool = False) -> tuple[tuple, dict]:
    rows = math.prod(x.shape[:-1])
    few = x.reshape(rows, -1)[:_SAMPLE]
    return ((few,) if scale is None else (few, scale)), {"fast": fast}


def _fit_gelu(x: Tensor, *, fast: bool = False) -> Hashable:
    return _fit(x)


def _sample_gelu(x: Tensor, *, fast: bool = False) -> tuple[tuple, dict]:
    return _sample(x)


@operation(twin=_twin_of_quantize, fit=_fit, sample=_sample, contract=EXACT)
def quantize_rows(x: Tensor, scale: Tensor | None = None, *, fast: bool = False) -> Quantized:
    """x [..., C] as eight-bit floats with one scale for each row: q = e4m3(clamp(x / s, +-448)), s = max(|x|) / 448.

    The row's scale is at least 1e-12. scale: one float32 element, taken for all rows instead (a checkpoint's
    ``input_scale``). Divisions and cast round to nearest. A row with a NaN becomes one of NaN (with a given scale only
    the NaN itself). ``fast`` changes nothing.
    """
    rows = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    parts = rows.split(max(1, _ELEMENTS // max(1, rows.shape[1])))
    data, scales = zip(*(_quantized(part, scale) for part in parts), strict=True)
    shape = (*x.shape[:-1], 1)
    return Quantized(_joined(data).view(x.shape), torch.cat(scales).view(shape) if scale is None else scale)


def _quantized(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    numbers = x.to(torch.float32)
    if scale is None:
        peak = numbers.abs().amax(-1, keepdim=True)
        # a tensor as divisor: CUDA multiplies by the inverse of a number
        scale = (peak / peak.new_full((), LARGEST)).clamp_min(SMALLEST_SCALE)
    # the cast saturates on some devices only
    return (numbers / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def _joined(parts: Sequence[Tensor]) -> Tensor:
    # as bytes: not every operation takes eight-bit floats
    return torch.cat([part.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)


@operation(twin=_twin_of_gelu, fit=_fit_gelu, sample=_sample_gelu, contract=CLOSE)
def gelu_quantize(x: Tensor, *, fast: bool = False) -> Quantized:
    """GELU (tanh form) of x [..., C], rounded to x's dtype, as ``quantize_rows`` gives it. ``fast`` changes nothing."""
    return quantize_rows.definition(F.gelu(x, approximate="tanh"))
