"""Rounding up or down at random, in proportion, so that small changes survive in the mean.

The random numbers are a hash of a key and the element's index: equal on every device, in every order of computation.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

# bounds the temporary memory, about 40 bytes an element
_CHUNK = 2**22

# dtype -> (bits of the mantissa, smallest exponent of a normal number)
_GRIDS = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}


def round_to_fp8(x: Tensor, dtype: torch.dtype, *, name: str, seed: int = 0) -> Tensor:
    """x in FP8, each element rounded to one of its two neighbours, the nearer the likelier; numbers of the grid stay.

    x: any shape, computed in float32. name, seed: choose the random numbers. Magnitudes beyond the largest number of
    the dtype become that number; NaN stays.

    a = |x|, e = max(floor(log2 a), smallest exponent), step = 2^(e - mantissa bits), y = floor(a / step + u) * step with
    u uniform in [0, 1): y is a number of the grid, so the cast is exact.
    """
    key = zlib.crc32(f"{seed}:{name}".encode())
    flat = x.reshape(-1)
    out = torch.empty(flat.shape, dtype=dtype, device=x.device)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK].to(torch.float32)
        up = uniform(start, piece.numel(), key, x.device)
        out[start : start + _CHUNK] = _round(piece, up, dtype)
    return out.view(x.shape)


def uniform(start: int, count: int, key: int, device: torch.device) -> Tensor:
    """Numbers start to start + count - 1 of a sequence of uniform float32 in [0, 1), multiples of 2^-24.

    Each is the upper 24 bits of mix(mix(index) + key) in 32-bit arithmetic that wraps.
    """
    if start + count > 2**31:
        raise ValueError(f"element {start + count - 1} has no random number: at most {2**31} elements")
    index = torch.arange(start, start + count, dtype=torch.int32, device=device)
    bits = _mix(_mix(index).add_(_signed(key)))
    return _shifted(bits, 8).to(torch.float32).mul_(2.0**-24)


def _round(x: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
    mantissa, smallest = _GRIDS[dtype]
    largest = torch.finfo(dtype).max
    a = x.abs().clamp_max_(largest)
    # the exponent field of a float32; a power of two has an empty mantissa, so division by it is exact
    exponent = ((a.view(torch.int32) >> 23) - 127).clamp_min_(smallest)
    step = ((exponent + (127 - mantissa)) << 23).view(torch.float32)
    steps = a / step
    whole = steps.floor()
    # floor(steps + 1 - u) without the rounding of that sum, which would move numbers of the grid
    whole += u < steps - whole
    return (whole * step).clamp_max_(largest).copysign_(x).to(dtype)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that scatters neighbours (C. Wellons' lowbias32, in the public domain)."""
    x = (x ^ _shifted(x, 16)) * 0x7FEB352D
    x = (x ^ _shifted(x, 15)) * _signed(0x846CA68B)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right, zeros from the left."""
    return (x >> bits) & (0xFFFFFFFF >> bits)


def _signed(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number
