"""Device functions that the kernels share: rows of memory, rounding, eight-bit numbers.

Names in all kernels: ``p_`` pointers, ``o_`` offsets, ``b_`` values in float32, ``h_`` values in the tensors' own dtype. In
capitals: constants of compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice
from triton.language.target_info import cuda_capability_geq

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
    """float32 to the nearest number of DTYPE, ties to even, still as float32. NaN stays.

    The interpreter's cast to bfloat16 truncates, so there it is done on the bits. A GPU's rounds, in half an instruction.
    """
    if DTYPE == tl.bfloat16 and _INTERPRETED:
        bits = b_x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        b_x = tl.where(b_x == b_x, bits.to(tl.float32, bitcast=True), float("nan"))
    elif DTYPE != tl.float32:
        b_x = b_x.to(DTYPE).to(tl.float32)
    return b_x


@triton.jit
def rounded_in_pairs(b_x, DTYPE: tl.constexpr):
    """``rounded`` for what does not go straight to memory: the compiler would round it one by one, many times slower."""
    if DTYPE == tl.bfloat16 and b_x.numel > 1 and not _INTERPRETED:
        b_x = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,r,r",
            [b_x],
            tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        b_x = rounded(b_x, DTYPE)
    return b_x


@triton.jit
def between(b_x, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """The rounding of an intermediate result: none in fast mode."""
    if not FAST:
        b_x = rounded(b_x, DTYPE)
    return b_x


@triton.jit
def narrowed(b_x, DTYPE: tl.constexpr):
    """``rounded``, in DTYPE, if it is not yet: for ``product`` and ``total``."""
    if b_x.dtype == DTYPE:
        h_x = b_x
    elif DTYPE == tl.bfloat16 and not _INTERPRETED:
        h_x = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [b_x], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        h_x = rounded(b_x, DTYPE).to(DTYPE)
    return h_x


@triton.jit
def widened(h_x):
    """In float32; of bfloat16 in one instruction each, where the compiler would take numbers out of their pair first."""
    if h_x.dtype == tl.bfloat16 and not _INTERPRETED:
        b_x = tl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", "=&r,=r,r", [h_x], tl.float32, is_pure=True, pack=2
        )
    else:
        b_x = h_x.to(tl.float32)
    return b_x


@triton.jit
def product(h_x, h_y):
    """x * y rounded to their dtype; of 16 bits two at once, in one instruction.

    The same bits as by way of float32, which has more than twice as many digits: rounded twice is rounded once then.
    """
    DTYPE: tl.constexpr = h_x.dtype
    if _INTERPRETED or DTYPE == tl.float32:
        h_z = rounded(h_x.to(tl.float32) * h_y.to(tl.float32), DTYPE).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        # the only such instruction of older GPUs; adding -0 changes no sign
        h_z = tl.inline_asm_elementwise(
            "{ .reg .b32 none; mov.b32 none, 0x80008000; fma.rn.bf16x2 $0, $1, $2, none; }",
            "=r,r,r",
            [h_x, h_y],
            tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        h_z = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [h_x, h_y], tl.float16, is_pure=True, pack=2
        )
    return h_z


@triton.jit
def total(h_x, h_y):
    """x + y like ``product``."""
    DTYPE: tl.constexpr = h_x.dtype
    if _INTERPRETED or DTYPE == tl.float32:
        h_z = rounded(h_x.to(tl.float32) + h_y.to(tl.float32), DTYPE).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        h_z = tl.inline_asm_elementwise(
            "{ .reg .b32 one; mov.b32 one, 0x3F803F80; fma.rn.bf16x2 $0, $1, one, $2; }",
            "=r,r,r",
            [h_x, h_y],
            tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        h_z = tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [h_x, h_y], tl.float16, is_pure=True, pack=2
        )
    return h_z


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
def quick_inverse(b_x):
    """1 / x a unit off, in one instruction; 0 beyond 2^126."""
    if _INTERPRETED:
        b_y = 1.0 / b_x
    else:
        b_y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b_x], tl.float32, is_pure=True, pack=1)
    return b_y


@triton.jit
def quick_sigmoid(b_x):
    """1 / (1 + e^-x) a few units off, in four instructions: for what is rounded to 16 bits at once.

    Where e^-x overflows it is 0.
    """
    return _logistic(b_x * -1.4426950408889634)


@triton.jit
def _logistic(b_x):
    """1 / (1 + 2^x)"""
    if _INTERPRETED:
        # in float64, where nothing overflows that matters
        b_y = (1.0 / (1.0 + tl.exp2(b_x.to(tl.float64)))).to(tl.float32)
    else:
        b_power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [b_x], tl.float32, is_pure=True, pack=1
        )
        b_y = quick_inverse(1.0 + b_power)
    return b_y


@triton.jit
def quick_gelu_tanh(b_x):
    """x / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 x^3), which is x / (1 + e^-2u); as near as that.

    The factors are those of u times -2 log2(e).
    """
    b_power = b_x * tl.fma(b_x * b_x, -0.10294324, -2.3022082)
    return b_x * _logistic(b_power)


@triton.jit
def _larger(b_x, b_y):
    return tl.maximum(b_x, b_y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(b_x):
    """The largest magnitude; NaN if there is one."""
    if _INTERPRETED:
        # integers in the order of the magnitudes, NaN above infinity: its maximum loses NaN
        b_bits = b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        peak = tl.max(tl.ravel(b_bits), axis=0).to(tl.float32, bitcast=True)
    else:
        peak = tl.reduce(tl.abs(b_x), None, _larger)
    return peak


@triton.jit
def e4m3_scale(peak):
    """max(peak / 448, 1e-12); a NaN stays."""
    scale = tl.div_rn(peak, 448.0)
    return tl.where(scale < 1e-12, 1e-12, scale)


@triton.jit
def e4m3(b_x, scale):
    """x / scale, clamped to +-448 and rounded to the nearest e4m3 number, ties to even, as its byte.

    scale: one number, infinite where an x is. Every x / scale is small enough not to overflow.
    """
    if not _INTERPRETED and cuda_capability_geq(8, 9):
        byte = _converted_e4m3(b_x, scale)
    else:
        byte = _composed_e4m3(b_x, scale)
    return byte


@triton.jit
def _converted_e4m3(b_x, scale):
    """By the instruction that newer GPUs have, which also clamps.

    The quotient is that of a division, in three instructions: x * (1 / scale) corrected once by what it leaves (Markstein).
    """
    inverse = tl.div_rn(1.0, scale)
    # infinity times the quotient 0 would be NaN
    finite = tl.where(scale < float("inf"), scale, 0.0)
    b_y = b_x * inverse
    b_left = tl.fma(b_y, -finite, b_x)
    b_y = tl.fma(b_left, inverse, b_y)
    return b_y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _composed_e4m3(b_x, scale):
    """Of integers, because neither the interpreter nor older GPUs cast to eight bits like torch."""
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
    byte = byte | ((b_y.to(tl.int32, bitcast=True) >> 24) & 0x80)
    return byte.to(tl.uint8)
