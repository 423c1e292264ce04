"""``head_gate``: a program holds one token, as heads by channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_triton import between, e4m3, e4m3_scale, largest, rounded, rounded_in_pairs, sigmoid
from .dispatch import opaque
from .launch import options
from .quantized import Quantized


@triton.jit(do_not_specialize=["tokens"])
def head_gate_kernel(
    p_x,
    x_batch,
    x_token,
    p_logits,
    logits_batch,
    logits_token,
    p_out,
    p_data,
    p_scale,
    tokens,
    FAST: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    o_row = tl.program_id(0).to(tl.int64)
    o_batch = o_row // tokens
    o_token = o_row % tokens
    o_heads = tl.arange(0, HEADS)
    o_cells = o_heads[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]

    b_x = tl.load(p_x + o_batch * x_batch + o_token * x_token + o_cells).to(tl.float32)
    b_logits = tl.load(p_logits + o_batch * logits_batch + o_token * logits_token + o_heads).to(tl.float32)
    b_gate = 2.0 * between(sigmoid(b_logits), DTYPE, FAST)
    b_out = b_x * b_gate[:, None]

    o_out = o_row * (HEADS * CHANNELS) + o_cells
    tl.store(p_out + o_out, rounded(b_out, DTYPE).to(DTYPE))
    if p_data is not None:
        b_out = rounded_in_pairs(b_out, DTYPE)
        scale = e4m3_scale(largest(b_out))
        tl.store(p_scale + o_row, scale)
        tl.store(p_data + o_out, e4m3(b_out, scale))


def _results(out: Tensor, logits: Tensor, fast: bool, quantize: bool) -> list[Tensor]:
    made = [out.new_empty(out.shape)]
    if quantize:
        made.append(out.new_empty(out.shape, dtype=torch.float8_e4m3fn))
        made.append(out.new_empty((*out.shape[:-1], 1), dtype=torch.float32))
    return made


@opaque("head_gate", "(Tensor out, Tensor logits, bool fast, bool quantize) -> Tensor[]", _results)
def launch(out: Tensor, logits: Tensor, fast: bool, quantize: bool) -> list[Tensor]:
    made = _results(out, logits, fast, quantize)
    batch, tokens, width = out.shape
    heads = logits.shape[2]
    gated, data, scale = made if quantize else (*made, None, None)
    head_gate_kernel[(batch * tokens,)](
        out,
        out.stride(0),
        out.stride(1),
        logits,
        logits.stride(0),
        logits.stride(1),
        gated,
        None if data is None else data.view(torch.uint8),
        scale,
        tokens,
        FAST=fast,
        HEADS=heads,
        CHANNELS=width // heads,
        **options(width, quantize=quantize),
    )
    return made


def head_gate(
    out: Tensor, logits: Tensor, *, fast: bool = False, quantize: bool = False
) -> Tensor | tuple[Tensor, Quantized]:
    gated, *eight_bit = launch(out, logits, fast, quantize)
    return (gated, Quantized(*eight_bit)) if quantize else gated
