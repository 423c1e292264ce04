"""``head_gate``: a program holds one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_triton import e4m3, e4m3_scale, largest, narrowed, product, rounded, sigmoid, widened
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
    o_cells = tl.arange(0, HEADS * CHANNELS)
    o_heads = tl.arange(0, HEADS)

    # what is rounded after every operation is computed in 16 bits
    KEPT: tl.constexpr = tl.float32 if FAST else DTYPE
    h_x = tl.load(p_x + o_batch * x_batch + o_token * x_token + o_cells).to(KEPT)
    b_logits = tl.load(p_logits + o_batch * logits_batch + o_token * logits_token + o_heads).to(tl.float32)
    h_gate = (2.0 * rounded(sigmoid(b_logits), KEPT)).to(KEPT)
    h_gated = product(tl.reshape(h_x, (HEADS, CHANNELS)), h_gate[:, None])
    h_out = narrowed(tl.reshape(h_gated, (HEADS * CHANNELS,)), DTYPE)

    o_out = o_row * (HEADS * CHANNELS) + o_cells
    if p_scale is None:
        tl.store(p_out + o_out, h_out)
    else:
        b_out = widened(h_out)
        scale = e4m3_scale(largest(b_out))
        tl.store(p_scale + o_row, scale)
        tl.store(p_out + o_out, e4m3(b_out, scale))


def _results(out: Tensor, logits: Tensor, fast: bool, quantize: bool) -> list[Tensor]:
    """The gated heads, or in eight bits their numbers and scales."""
    if not quantize:
        return [out.new_empty(out.shape)]
    scales = out.new_empty((*out.shape[:-1], 1), dtype=torch.float32)
    return [out.new_empty(out.shape, dtype=torch.float8_e4m3fn), scales]


@opaque("head_gate", "(Tensor out, Tensor logits, bool fast, bool quantize) -> Tensor[]", _results)
def launch(out: Tensor, logits: Tensor, fast: bool, quantize: bool) -> list[Tensor]:
    made = _results(out, logits, fast, quantize)
    batch, tokens, width = out.shape
    heads = logits.shape[2]
    head_gate_kernel[(batch * tokens,)](
        out,
        out.stride(0),
        out.stride(1),
        logits,
        logits.stride(0),
        logits.stride(1),
        made[0].view(torch.uint8) if quantize else made[0],
        made[1] if quantize else None,
        tokens,
        FAST=fast,
        HEADS=heads,
        CHANNELS=width // heads,
        **options(width, quantize=quantize),
    )
    return made


def head_gate(out: Tensor, logits: Tensor, *, fast: bool = False, quantize: bool = False) -> Tensor | Quantized:
    made = launch(out, logits, fast, quantize)
    return Quantized(*made) if quantize else made[0]
