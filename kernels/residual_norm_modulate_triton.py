"""``residual_norm_modulate`` in one pass: a program holds one token."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_triton import between, e4m3, e4m3_scale, largest, load_row, rounded, rounded_in_pairs, store_row
from .dispatch import opaque
from .launch import next_power_of_two, options
from .quantized import Quantized
from .residual_norm_modulate import Modulated
from .rows import Rows


@triton.jit
def _vector(p_values, o_batch, o_token, stride_batch, stride_row):
    """Where a token's vector begins."""
    return p_values + o_batch * stride_batch + o_token * stride_row


@triton.jit
def _modulated(
    b_normed,
    p_scale,
    p_shift,
    o_columns,
    DTYPE: tl.constexpr,
    FAST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b_factor = between(1.0 + load_row(p_scale, o_columns, WIDTH, BLOCK), DTYPE, FAST)
    b_product = between(b_normed * b_factor, DTYPE, FAST)
    return b_product + load_row(p_shift, o_columns, WIDTH, BLOCK)


@triton.jit
def _store_quantized(
    b_row,
    p_data,
    p_step,
    o_row,
    o_columns,
    DTYPE: tl.constexpr,
    FAST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the row as it is stored in DTYPE."""
    if FAST:
        b_row = rounded_in_pairs(b_row, DTYPE)
    else:
        # ends in an addition, which the compiler does in DTYPE
        b_row = rounded(b_row, DTYPE)
    step = e4m3_scale(largest(b_row))
    tl.store(p_step + o_row, step)
    store_row(p_data + o_row * WIDTH, o_columns, e4m3(b_row, step), WIDTH, BLOCK)


@triton.jit(do_not_specialize=["tokens"])
def residual_norm_modulate_kernel(
    p_x,
    x_batch,
    x_token,
    p_branch,
    branch_batch,
    branch_token,
    p_gate,
    p_gate_index,
    gate_batch,
    gate_row,
    p_keep,
    keep_batch,
    p_sum,
    p_first,
    p_first_scale,
    p_first_shift,
    p_first_index,
    first_batch,
    first_row,
    p_first_data,
    p_first_step,
    p_second,
    p_second_scale,
    p_second_shift,
    p_second_index,
    second_batch,
    second_row,
    p_second_data,
    p_second_step,
    tokens,
    eps,
    NORM: tl.constexpr,
    FAST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    o_row = tl.program_id(0).to(tl.int64)
    o_batch = o_row // tokens
    o_token = o_row % tokens
    o_columns = tl.arange(0, BLOCK)
    o_out = o_row * WIDTH

    b_x = load_row(p_x + o_batch * x_batch + o_token * x_token, o_columns, WIDTH, BLOCK)
    if p_branch is not None:
        b_branch = load_row(p_branch + o_batch * branch_batch + o_token * branch_token, o_columns, WIDTH, BLOCK)
        if p_gate is not None:
            o_gate = o_token
            if p_gate_index is not None:
                o_gate = tl.load(p_gate_index + o_row).to(tl.int64)
            p_row = _vector(p_gate, o_batch, o_gate, gate_batch, gate_row)
            b_branch = between(b_branch * load_row(p_row, o_columns, WIDTH, BLOCK), DTYPE, FAST)
        if p_keep is not None:
            b_keep = tl.load(p_keep + o_batch * keep_batch).to(tl.float32)
            b_branch = between(b_branch * b_keep, DTYPE, FAST)
        b_x = b_x + b_branch
        b_sum = rounded(b_x, DTYPE)
        store_row(p_sum + o_out, o_columns, b_sum, WIDTH, BLOCK)
        if not FAST:
            b_x = b_sum

    if p_first is not None:
        b_normed = b_x
        if NORM:
            mean = tl.sum(b_x * b_x, axis=0) * (1.0 / WIDTH)
            b_normed = between(b_x * tl.rsqrt(mean + tl.cast(eps, tl.float32)), DTYPE, FAST)

        b_first = b_normed
        if p_first_scale is not None:
            o_first = o_token
            if p_first_index is not None:
                o_first = tl.load(p_first_index + o_row).to(tl.int64)
            p_scale = _vector(p_first_scale, o_batch, o_first, first_batch, first_row)
            p_shift = _vector(p_first_shift, o_batch, o_first, first_batch, first_row)
            b_first = _modulated(b_normed, p_scale, p_shift, o_columns, DTYPE, FAST, WIDTH, BLOCK)
        store_row(p_first + o_out, o_columns, rounded(b_first, DTYPE), WIDTH, BLOCK)
        if p_first_data is not None:
            _store_quantized(b_first, p_first_data, p_first_step, o_row, o_columns, DTYPE, FAST, WIDTH, BLOCK)

        if p_second is not None:
            b_second = b_normed
            if p_second_scale is not None:
                o_second = o_token
                if p_second_index is not None:
                    o_second = tl.load(p_second_index + o_row).to(tl.int64)
                p_scale_2 = _vector(p_second_scale, o_batch, o_second, second_batch, second_row)
                p_shift_2 = _vector(p_second_shift, o_batch, o_second, second_batch, second_row)
                b_second = _modulated(b_normed, p_scale_2, p_shift_2, o_columns, DTYPE, FAST, WIDTH, BLOCK)
            store_row(p_second + o_out, o_columns, rounded(b_second, DTYPE), WIDTH, BLOCK)
            if p_second_data is not None:
                _store_quantized(b_second, p_second_data, p_second_step, o_row, o_columns, DTYPE, FAST, WIDTH, BLOCK)


def _results(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    gate_index: Tensor | None,
    keep: Tensor | None,
    scales: list[Tensor | None],
    shifts: list[Tensor | None],
    indices: list[Tensor | None],
    eps: float | None,
    fast: bool,
    quantize: bool,
) -> list[Tensor]:
    """The sum if there is a branch; then each output, followed by its eight-bit numbers and their scales if wanted."""
    made = [] if branch is None else [x.new_empty(x.shape)]
    for _ in scales:
        made.append(x.new_empty(x.shape))
        if quantize:
            made.append(x.new_empty(x.shape, dtype=torch.float8_e4m3fn))
            made.append(x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
    return made


@opaque(
    "residual_norm_modulate",
    "(Tensor x, Tensor? branch, Tensor? gate, Tensor? gate_index, Tensor? keep, Tensor?[] scales, Tensor?[] shifts, "
    "Tensor?[] indices, float? eps, bool fast, bool quantize) -> Tensor[]",
    _results,
)
def launch(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    gate_index: Tensor | None,
    keep: Tensor | None,
    scales: list[Tensor | None],
    shifts: list[Tensor | None],
    indices: list[Tensor | None],
    eps: float | None,
    fast: bool,
    quantize: bool,
) -> list[Tensor]:
    made = _results(x, branch, gate, gate_index, keep, scales, shifts, indices, eps, fast, quantize)
    batch, tokens, width = x.shape
    block = next_power_of_two(width)
    free = iter(made)
    total = None if branch is None else next(free)
    outputs: list[Any] = []
    for scale, shift, index in zip(scales, shifts, indices, strict=True):
        out = next(free)
        eight_bit = (next(free).view(torch.uint8), next(free)) if quantize else (None, None)
        outputs += [out, scale, shift, _dense(index), *_steps(scale), *eight_bit]
    outputs += [None, None, None, None, 0, 0, None, None] * (2 - len(scales))
    residual_norm_modulate_kernel[(batch * tokens,)](
        x,
        *_token_strides(x),
        branch,
        *_token_strides(branch),
        gate,
        _dense(gate_index),
        *_steps(gate),
        keep,
        0 if keep is None else keep.stride(0),
        total,
        *outputs,
        tokens,
        0.0 if eps is None else eps,
        NORM=eps is not None,
        FAST=fast,
        WIDTH=width,
        BLOCK=block,
        **options(block, quantize=quantize),
    )
    return made


def _token_strides(x: Tensor | None) -> tuple[int, int]:
    """Steps from sample to sample and from token to token."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _steps(values: Tensor | None) -> tuple[int, int]:
    """Steps between modulation vectors, 0 along an axis of length 1."""
    if values is None:
        return 0, 0
    batch, vectors, _ = values.shape
    return (0 if batch == 1 else values.stride(0)), (0 if vectors == 1 else values.stride(1))


def _dense(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


def residual_norm_modulate(
    x: Tensor,
    modulations: tuple[Modulated, ...],
    eps: float | None,
    *,
    branch: Tensor | None = None,
    gate: Rows | None = None,
    keep: Tensor | None = None,
    fast: bool = False,
    quantize: bool = False,
) -> tuple[Tensor, tuple[Any, ...]]:
    made = launch(
        x,
        branch,
        None if gate is None else gate.values,
        None if gate is None else gate.index,
        keep,
        [None if m is None else m[0].values for m in modulations],
        [None if m is None else m[1].values for m in modulations],
        [None if m is None else m[0].index for m in modulations],
        eps,
        fast,
        quantize,
    )
    total, outputs = (x, made) if branch is None else (made[0], made[1:])
    if not quantize:
        return total, tuple(outputs)
    triples = zip(outputs[::3], outputs[1::3], outputs[2::3], strict=True)
    return total, tuple((out, Quantized(data, scale)) for out, data, scale in triples)
