"""The rotary operations in one kernel: a program turns one token of one or two tensors and reads the tables once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_triton import rounded, rounded_in_pairs
from .dispatch import opaque
from .launch import options


@triton.jit
def _mean_square(b_first, b_second, WIDTH: tl.constexpr):
    b_squares = b_first * b_first + b_second * b_second
    return tl.sum(tl.sum(b_squares, axis=1), axis=0) * (1.0 / WIDTH)


@triton.jit
def _turn(p_out, o_out, b_first, b_second, b_cos, b_sin, HALF: tl.constexpr, FAST: tl.constexpr):
    """Store the rotated halves."""
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    b_left, b_right = b_first * b_cos, b_second * b_cos
    if not FAST:
        b_left, b_right = rounded_in_pairs(b_left, DTYPE), rounded_in_pairs(b_right, DTYPE)
    b_left -= b_second * b_sin
    b_right += b_first * b_sin
    tl.store(p_out + o_out, rounded(b_left, DTYPE).to(DTYPE))
    tl.store(p_out + o_out + HALF, rounded(b_right, DTYPE).to(DTYPE))


@triton.jit
def _norm(b_half, rstd, p_weight, o_weight, DTYPE: tl.constexpr, FAST: tl.constexpr):
    b_weight = tl.load(p_weight + o_weight).to(tl.float32)
    b_normed = b_half * rstd * b_weight
    if not FAST:
        b_normed = rounded_in_pairs(b_normed, DTYPE)
    return b_normed


@triton.jit(do_not_specialize=["tokens"])
def rotary_kernel(
    p_q,
    q_batch,
    q_token,
    q_head,
    p_q_weight,
    p_q_out,
    p_k,
    k_batch,
    k_token,
    k_head,
    p_k_weight,
    p_k_out,
    p_cos,
    p_sin,
    table_batch,
    table_head,
    table_token,
    tokens,
    eps,
    FAST: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    WIDTH: tl.constexpr = HEADS * HALF * 2
    o_row = tl.program_id(0).to(tl.int64)
    o_batch = o_row // tokens
    o_token = o_row % tokens
    o_heads = tl.arange(0, HEADS)[:, None]
    o_half = tl.arange(0, HALF)[None, :]
    o_weight = o_heads * (2 * HALF) + o_half
    o_out = o_row * WIDTH + o_weight

    o_table = o_batch * table_batch + o_token * table_token + o_heads.to(tl.int64) * table_head + o_half
    b_cos = tl.load(p_cos + o_table).to(tl.float32)
    b_sin = tl.load(p_sin + o_table).to(tl.float32)

    o_q = o_batch * q_batch + o_token * q_token + o_heads.to(tl.int64) * q_head + o_half
    b_q_first = tl.load(p_q + o_q).to(tl.float32)
    b_q_second = tl.load(p_q + o_q + HALF).to(tl.float32)
    if p_q_weight is not None:
        q_rstd = tl.rsqrt(_mean_square(b_q_first, b_q_second, WIDTH) + tl.cast(eps, tl.float32))
        b_q_first = _norm(b_q_first, q_rstd, p_q_weight, o_weight, DTYPE, FAST)
        b_q_second = _norm(b_q_second, q_rstd, p_q_weight, o_weight + HALF, DTYPE, FAST)
    _turn(p_q_out, o_out, b_q_first, b_q_second, b_cos, b_sin, HALF, FAST)

    if p_k is not None:
        o_k = o_batch * k_batch + o_token * k_token + o_heads.to(tl.int64) * k_head + o_half
        b_k_first = tl.load(p_k + o_k).to(tl.float32)
        b_k_second = tl.load(p_k + o_k + HALF).to(tl.float32)
        k_rstd = tl.rsqrt(_mean_square(b_k_first, b_k_second, WIDTH) + tl.cast(eps, tl.float32))
        b_k_first = _norm(b_k_first, k_rstd, p_k_weight, o_weight, DTYPE, FAST)
        b_k_second = _norm(b_k_second, k_rstd, p_k_weight, o_weight + HALF, DTYPE, FAST)
        _turn(p_k_out, o_out, b_k_first, b_k_second, b_cos, b_sin, HALF, FAST)


def _results(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    fast: bool,
) -> list[Tensor]:
    """Token-major and contiguous, [B, T, H, D] of each tensor."""
    batch, tokens, heads, width = q.shape
    return [q.new_empty(batch, tokens, heads, width) for _ in range(1 if k is None else 2)]


@opaque(
    "split_rotary",
    "(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps, bool fast) -> Tensor[]",
    _results,
)
def launch(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    fast: bool,
) -> list[Tensor]:
    """q, k: [B, T, H, D]. Without weights nothing is normalised."""
    made = _results(q, k, q_weight, k_weight, cos, sin, eps, fast)
    batch, tokens, heads, width = q.shape
    table_batch, table_head, table_token, _ = cos.stride()
    rotary_kernel[(batch * tokens,)](
        q,
        *q.stride()[:3],
        q_weight,
        made[0],
        k,
        *((0, 0, 0) if k is None else k.stride()[:3]),
        k_weight,
        None if k is None else made[1],
        cos,
        sin,
        0 if cos.shape[0] == 1 else table_batch,
        table_head,
        table_token,
        tokens,
        eps,
        FAST=fast,
        HEADS=heads,
        HALF=width // 2,
        # half the warps for two tensors: 5 percent faster
        **options(heads * width if k is None else heads * width // 2),
    )
    return made


def apply_split_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, fast: bool = False) -> Tensor:
    (turned,) = launch(x.transpose(1, 2), None, None, None, cos, sin, 0.0, fast)
    return turned.transpose(1, 2)


def norm_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, fast: bool = False) -> Tensor:
    (turned,) = launch(_by_head(x, cos), None, weight, None, cos, sin, eps, fast)
    return turned.flatten(2)


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    fast: bool = False,
) -> tuple[Tensor, Tensor]:
    turned = launch(_by_head(q, cos), _by_head(k, cos), q_weight, k_weight, cos, sin, eps, fast)
    return turned[0].flatten(2), turned[1].flatten(2)


def _by_head(x: Tensor, cos: Tensor) -> Tensor:
    """[B, T, H * D] -> [B, T, H, D]"""
    return x.unflatten(-1, (cos.shape[1], -1))
