"""NVFP4 weights: four-bit floats, an e4m3 scale for every 16 of a row and one float32 scale for all.

W = value * (block scale * scale_2), products in float32, as comfy-kitchen 0.2.40, ComfyUI's library of formats,
computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .swizzle import padded_shape, swizzle, unswizzle

BLOCK = 16

_LARGEST, _LARGEST_SCALE = 6.0, 448.0


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the block scales of a weight [rows, columns]."""
    return padded_shape(rows, columns // BLOCK)


def unpack_nvfp4(data: Tensor, scale: Tensor, scale_2: Tensor, dtype: torch.dtype) -> Tensor:
    """data: [out, in / 2] uint8, the even column in the upper half. scale: e4m3, ``scale_shape``. scale_2: one number.

    Returns [out, in] in ``dtype``.
    """
    rows, columns = data.shape[0], 2 * data.shape[1]
    codes = torch.stack((data >> 4, data & 15), -1).view(rows, columns // BLOCK, BLOCK)
    blocks = _unswizzled(scale, rows, columns // BLOCK) * scale_2.to(torch.float32).reshape(())
    return _values(codes).mul_(blocks[..., None]).view(rows, columns).to(dtype)


def pack_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """data, scale and scale_2 of a weight [out, in], rounded to nearest. in: a multiple of 16.

    scale_2 = amax / (6 * 448), a block's scale = its amax / (6 * scale_2) in e4m3.
    """
    rows, columns = weight.shape
    blocks = weight.to(torch.float32).reshape(rows, columns // BLOCK, BLOCK)
    tiny = torch.finfo(torch.float32).tiny
    scale_2 = (blocks.abs().amax() / blocks.new_full((), _LARGEST * _LARGEST_SCALE)).clamp_min(tiny)
    scale = (blocks.abs().amax(-1) / (_LARGEST * scale_2)).clamp_max(_LARGEST_SCALE).to(torch.float8_e4m3fn)
    grid = (scale.to(torch.float32) * scale_2).clamp_min(tiny)
    codes = _codes(blocks / grid[..., None]).view(rows, columns // 2, 2)
    swizzled = swizzle(scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    return codes[..., 0] << 4 | codes[..., 1], swizzled, scale_2


def _unswizzled(scale: Tensor, rows: int, columns: int) -> Tensor:
    scale = unswizzle(scale.view(torch.uint8), rows, columns).contiguous().view(torch.float8_e4m3fn)
    return scale.to(torch.float32)


def _values(codes: Tensor) -> Tensor:
    """float32 values of e2m1 codes: bits 0 to 2 are 0, 0.5, 1, 1.5, 2, 3, 4, 6, bit 3 is the sign."""
    size = codes & 7
    # twice the value: 0 to 4 are themselves, then 6, 8, 12
    shift = (size >> 1).clamp_(1, 3) - 1
    doubled = (size - 2 * shift) << shift
    return (doubled.to(torch.int8) * (1 - (codes >> 3 << 1).to(torch.int8))).to(torch.float32).mul_(0.5)


def _codes(values: Tensor) -> Tensor:
    """The e2m1 codes nearest to values; ties go to the even code."""
    size = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for i, middle in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        code += size > middle if i % 2 == 0 else size >= middle
    return code | (values < 0).to(torch.uint8) << 3
