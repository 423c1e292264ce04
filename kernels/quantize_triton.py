"""``quantize_rows`` and ``gelu_quantize``: a program holds one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_triton import e4m3, e4m3_scale, largest, load_row, quick_gelu_tanh, rounded_in_pairs, store_row
from .dispatch import opaque
from .launch import next_power_of_two, options
from .quantized import Quantized


@triton.jit
def quantize_rows_kernel(p_x, p_given, p_data, p_scale, GELU: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    o_row = tl.program_id(0).to(tl.int64)
    o_columns = tl.arange(0, BLOCK)
    b_x = load_row(p_x + o_row * WIDTH, o_columns, WIDTH, BLOCK)
    if GELU:
        b_x = rounded_in_pairs(quick_gelu_tanh(b_x), DTYPE)
    if p_given is not None:
        scale = tl.load(p_given)
        # so that no quotient overflows, infinity's neither; NaN stays
        b_x = tl.where(b_x > 448.0 * scale, 448.0 * scale, tl.where(b_x < -448.0 * scale, -448.0 * scale, b_x))
    else:
        scale = e4m3_scale(largest(b_x))
        tl.store(p_scale + o_row, scale)
    store_row(p_data + o_row * WIDTH, o_columns, e4m3(b_x, scale), WIDTH, BLOCK)


def _results(x: Tensor, given: Tensor | None, gelu: bool) -> list[Tensor]:
    """Numbers, and their scales unless those are given."""
    data = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return [data] if given is not None else [data, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)]


@opaque("quantize_rows", "(Tensor x, Tensor? given, bool gelu) -> Tensor[]", _results)
def launch(x: Tensor, given: Tensor | None, gelu: bool) -> list[Tensor]:
    made = _results(x, given, gelu)
    width = x.shape[-1]
    block = next_power_of_two(width)
    quantize_rows_kernel[(x.numel() // width,)](
        x,
        given,
        made[0].view(torch.uint8),
        None if given is not None else made[1],
        GELU=gelu,
        WIDTH=width,
        BLOCK=block,
        **options(block, quantize=True),
    )
    return made


def quantize_rows(x: Tensor, scale: Tensor | None = None, *, fast: bool = False) -> Quantized:
    data, *own = launch(x, scale, False)
    return Quantized(data, *own) if scale is None else Quantized(data, scale)


def gelu_quantize(x: Tensor, *, fast: bool = False) -> Quantized:
    return Quantized(*launch(x, None, True))
