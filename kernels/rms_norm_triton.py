"""``rms_norm``: a program holds one token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_triton import load_row, rounded, store_row
from .dispatch import opaque
from .launch import next_power_of_two, options


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_kernel(p_x, x_batch, x_token, p_weight, p_out, tokens, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64)
    o_batch = o_row // tokens
    o_token = o_row % tokens
    o_columns = tl.arange(0, BLOCK)

    b_x = load_row(p_x + o_batch * x_batch + o_token * x_token, o_columns, WIDTH, BLOCK)
    b_weight = load_row(p_weight, o_columns, WIDTH, BLOCK)
    mean = tl.sum(b_x * b_x, axis=0) * (1.0 / WIDTH)
    b_out = b_x * tl.rsqrt(mean + tl.cast(eps, tl.float32)) * b_weight
    store_row(p_out + o_row * WIDTH, o_columns, rounded(b_out, p_x.dtype.element_ty), WIDTH, BLOCK)


def _result(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@opaque("rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor", _result)
def launch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = _result(x, weight, eps)
    batch, tokens, width = x.shape
    block = next_power_of_two(width)
    rms_norm_kernel[(batch * tokens,)](
        x,
        x.stride(0),
        x.stride(1),
        weight,
        out,
        tokens,
        eps,
        WIDTH=width,
        BLOCK=block,
        **options(block),
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return launch(x, weight, eps)
