"""MXFP8 weights: e4m3 numbers and, for every 32 of a row, a power of two (e8m0) as scale.

W = float32(q) * 2^(code - 127); code 255 is NaN (OCP Microscaling Formats, v1.0). The scales lie swizzled like NVFP4's,
which was found by unpacking what comfy-kitchen 0.2.40, ComfyUI's library of formats, packs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .swizzle import padded_shape, swizzle, unswizzle

BLOCK = 32

_LARGEST = 448.0


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scales of a weight [rows, columns]."""
    return padded_shape(rows, columns // BLOCK)


def unpack_mxfp8(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """data: [out, in] e4m3. scale: e8m0, or the same bytes as uint8, ``scale_shape``. Returns [out, in] in ``dtype``."""
    rows, columns = data.shape
    blocks = _powers(unswizzle(scale.view(torch.uint8), rows, columns // BLOCK))
    values = data.to(torch.float32).view(rows, columns // BLOCK, BLOCK)
    return values.mul_(blocks[..., None]).view(rows, columns).to(dtype)


def pack_mxfp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """data and scale (bytes, uint8) of a weight [out, in], rounded to nearest. in: a multiple of 32.

    A scale is the smallest power of two with which its block stays within e4m3's range.
    """
    rows, columns = weight.shape
    blocks = weight.to(torch.float32).reshape(rows, columns // BLOCK, BLOCK)
    peaks = blocks.abs().amax(-1)
    bits = (peaks / peaks.new_full((), _LARGEST)).view(torch.int32)
    # the exponent, one more where the mantissa is not empty
    code = ((bits + 0x7FFFFF) >> 23).clamp(1, 254).to(torch.uint8)
    data = (blocks / _powers(code)[..., None]).view(rows, columns).to(torch.float8_e4m3fn)
    return data, swizzle(code)


def _powers(codes: Tensor) -> Tensor:
    """float32 of e8m0 codes; assembled from bits, since a power function need not be exact."""
    wide = codes.to(torch.int32)
    bits = torch.where(wide == 0, 1 << 22, wide << 23)  # 2^-127 is subnormal
    return torch.where(wide == 255, 0x7FC00000, bits).view(torch.float32)
