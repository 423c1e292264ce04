"""Eight-bit floating-point weights: with a scale (per tensor, row or 128 x 128 block), or cast without one.

W = float32(q) * scale, rounded once to the wanted dtype. q is float8_e4m3fn or float8_e5m2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128


def scale_kind(scale: Sequence[int], weight: Sequence[int]) -> str | None:
    """What a scale of that shape is to a weight [out, in]: "tensor", "row", "block" or None (it does not fit)."""
    scale = tuple(scale)
    if scale in ((), (1,), (1, 1)):
        return "tensor"
    if len(weight) != 2:
        return None
    rows, columns = weight
    if scale in ((rows,), (rows, 1)):
        return "row"
    return "block" if scale == (-(-rows // BLOCK), -(-columns // BLOCK)) else None


def unpack_fp8(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """data: [out, in] in FP8. scale: floats of a shape that ``scale_kind`` knows. Returns [out, in] in ``dtype``."""
    return data.to(torch.float32).mul_(_spread(scale, data.shape)).to(dtype)


def pack_fp8(weight: Tensor, like: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Data and scale of a weight [out, in], rounded to nearest.

    like: a scale whose shape, and so granularity, and dtype the new one gets. The new scale is the largest magnitude
    that it covers over the largest number of the FP8 dtype (448 for e4m3).
    """
    weight = weight.to(torch.float32)
    largest = torch.finfo(dtype).max
    kind = _checked_kind(like.shape, weight.shape)
    if kind == "tensor":
        peaks = weight.abs().amax()
    elif kind == "row":
        peaks = weight.abs().amax(1)
    else:
        rows, columns = weight.shape
        padded = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
        tiles = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
        peaks = tiles.abs().amax((1, 3))
    # a tensor as divisor: CUDA multiplies by the inverse of a number. Never 0: a weight of zeros stays one of zeros
    scale = (
        (peaks / peaks.new_full((), largest)).clamp_min(torch.finfo(like.dtype).tiny).to(like.dtype).reshape(like.shape)
    )
    data = (weight / _spread(scale, weight.shape)).clamp_(-largest, largest).to(dtype)
    return data, scale


def _spread(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """The scale in float32, in a shape that broadcasts against the weight."""
    scale = scale.to(torch.float32)
    kind = _checked_kind(scale.shape, shape)
    if kind == "tensor":
        return scale.reshape(())
    if kind == "row":
        return scale.reshape(-1, 1)
    rows, columns = shape
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def _checked_kind(scale: Sequence[int], weight: Sequence[int]) -> str:
    kind = scale_kind(scale, weight)
    if kind is None:
        raise ValueError(f"a scale of shape {list(scale)} does not fit a weight of shape {list(weight)}")
    return kind
