"""Device functions that the kernels share: rows of memory, rounding, eight-bit numbers.

Names in all kernels: ``p_`` pointers, ``o_`` offsets, ``b_`` values in float32. In capitals: constants of compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

VERSION: str = triton.__version__
INTERPRETED: bool = bool(knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def load_row(p_row, o_columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A row of WIDTH numbers in float32, zeros behind it."""
    if WIDTH == BLOCK:
        b_row = tl.load(p_row + o_columns).to(tl.float32)
    else:
        b_row = tl.load(p_row + o_columns, mask=o_columns < WIDTH, other=0.0).to(tl.float32)
    return b_row


@triton.jit
def store_row(p_row, o_columns, b_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store what ``rounded`` has made exact in the row's dtype."""
    if WIDTH == BLOCK:
        tl.store(p_row + o_columns, b_row.to(p_row.dtype.element_ty))
    else:
        tl.store(p_row + o_columns, b_row.to(p_row.dtype.element_ty), mask=o_columns < WIDTH)


@triton.jit
def rounded(b_x, DTYPE: tl.constexpr):
    """float32 to the nearest number of DTYPE, ties to even, still as float32.

    The interpreter's cast to bfloat16 truncates, the GPU's rounds: done on the bits, both give the same. NaN stays.
    """
    if DTYPE == tl.bfloat16:
        bits = b_x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        b_x = tl.where(b_x == b_x, bits.to(tl.float32, bitcast=True), float("nan"))
    elif DTYPE == tl.float16:
        b_x = b_x.to(tl.float16).to(tl.float32)
    return b_x


@triton.jit
def between(b_x, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """The rounding of an intermediate result: none in fast mode."""
    if not FAST:
        b_x = rounded(b_x, DTYPE)
    return b_x


@triton.jit
def exp(b_x):
    """e^x by the library that torch uses on the GPU: Triton's own is a few units off."""
    if _INTERPRETED:
        b_y = tl.exp(b_x)
    else:
        b_y = libdevice.exp(b_x)
    return b_y


@triton.jit
def sigmoid(b_x):
    """1 / (1 + e^-x)"""
    return tl.div_rn(1.0, 1.0 + exp(-b_x))


@triton.jit
def gelu_tanh(b_x):
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))"""
    b_inner = 0.7978845608028654 * (b_x + 0.044715 * (b_x * b_x * b_x))
    if _INTERPRETED:
        # no library there: in float64, whose exponential overflows to a quotient of 0
        b_tanh = (1.0 - 2.0 / (1.0 + tl.exp(2.0 * b_inner.to(tl.float64)))).to(tl.float32)
    else:
        b_tanh = libdevice.tanh(b_inner)
    return 0.5 * b_x * (1.0 + b_tanh)


@triton.jit
def magnitude_bits(b_x):
    """|x| as integers in the same order, NaN above infinity: their maximum is that of the numbers, and keeps NaN."""
    return b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def e4m3_scale(peak_bits):
    """max(peak / 448, 1e-12); a NaN stays."""
    scale = tl.div_rn(peak_bits.to(tl.float32, bitcast=True), 448.0)
    return tl.where(scale < 1e-12, 1e-12, scale)


@triton.jit
def e4m3(b_x, scale):
    """x / scale, clamped to +-448 and rounded to the nearest e4m3 number, ties to even, as its byte in int32.

    Made of integers, because neither the interpreter nor every GPU casts to eight bits like torch.
    """
    b_y = tl.div_rn(b_x, scale + tl.zeros_like(b_x))
    b_y = tl.where(b_y > 448.0, 448.0, tl.where(b_y < -448.0, -448.0, b_y))
    b_size = tl.abs(b_y)
    bits = b_size.to(tl.int32, bitcast=True)
    # exponent and three bits of mantissa, moved from bias 127 to 7
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # below 2^-6 steps are 2^-9, the last place of 1.5 * 2^14: the sum rounds to them and counts them
    small = (b_size + 24576.0).to(tl.int32, bitcast=True) - 0x46C00000
    byte = tl.where(b_size < 0.015625, small, normal)
    byte = tl.where(b_y == b_y, byte, 0x7F)
    return byte | ((b_y.to(tl.int32, bitcast=True) >> 24) & 0x80)
