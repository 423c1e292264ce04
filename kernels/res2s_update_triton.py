"""``res2s_update`` in one pass. The levels arrive as the bits of float64: none is rounded, no step compiles anew."""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

from .device_triton import INTERPRETED
from .dispatch import opaque
from .launch import options

_BLOCK = 1024


@triton.jit
def _number(bits, DTYPE: tl.constexpr):
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(DTYPE)


@triton.jit
def _quotient(b_x, divisor, BY_INVERSE: tl.constexpr):
    """As torch divides by a number: on the GPU it multiplies by the inverse."""
    if BY_INVERSE:
        if b_x.dtype == tl.float64:
            b_y = b_x * (1.0 / divisor)
        else:
            b_y = b_x * tl.div_rn(1.0, divisor)
    else:
        b_y = b_x / divisor
    return b_y


@triton.jit(do_not_specialize=["sigma", "step", "sigma_down", "alpha_ratio", "fresh"])
def res2s_update_kernel(
    p_x,
    p_target,
    p_noise,
    p_out,
    count,
    sigma,
    step,
    sigma_down,
    alpha_ratio,
    fresh,
    BY_INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    o_cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o_cells < count
    b_x = tl.load(p_x + o_cells, mask=inside, other=0.0)
    b_target = tl.load(p_target + o_cells, mask=inside, other=0.0)
    b_noise = tl.load(p_noise + o_cells, mask=inside, other=0.0).to(DTYPE)
    b_direction = _quotient(b_x - b_target, _number(step, DTYPE), BY_INVERSE)
    b_clean = b_x - _number(sigma, DTYPE) * b_direction
    b_part = _number(alpha_ratio, DTYPE) * (b_clean + _number(sigma_down, DTYPE) * b_direction)
    tl.store(p_out + o_cells, b_part + _number(fresh, DTYPE) * b_noise, mask=inside)


def _bits(number: float) -> int:
    """The bits of a float64 as an integer: kernels take numbers in float32 only."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _result(
    x: Tensor,
    target: Tensor,
    noise: Tensor,
    sigma: float,
    step: float,
    sigma_down: float,
    alpha_ratio: float,
    fresh: float,
) -> Tensor:
    return x.new_empty(x.shape)


@opaque(
    "res2s_update",
    "(Tensor x, Tensor target, Tensor noise, float sigma, float step, float sigma_down, float alpha_ratio, float fresh) "
    "-> Tensor",
    _result,
)
def launch(
    x: Tensor,
    target: Tensor,
    noise: Tensor,
    sigma: float,
    step: float,
    sigma_down: float,
    alpha_ratio: float,
    fresh: float,
) -> Tensor:
    out = _result(x, target, noise, sigma, step, sigma_down, alpha_ratio, fresh)
    count = x.numel()
    levels = (_bits(level) for level in (sigma, step, sigma_down, alpha_ratio, fresh))
    res2s_update_kernel[(-(-count // _BLOCK),)](
        x,
        target,
        noise,
        out,
        count,
        *levels,
        BY_INVERSE=not INTERPRETED,
        BLOCK=_BLOCK,
        **options(_BLOCK),
    )
    return out


def res2s_update(
    x: Tensor,
    target: Tensor,
    noise: Tensor,
    *,
    sigma: float,
    sigma_next: float,
    sigma_down: float,
    alpha_ratio: float,
    fresh: float,
) -> Tensor:
    return launch(x, target, noise, sigma, sigma - sigma_next, sigma_down, alpha_ratio, fresh)
