"""``quantize_rows`` and ``gelu_quantize``: a program holds one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_triton import e4m3, e4m3_scale, gelu_tanh, load_row, magnitude_bits, rounded, store_row
from .dispatch import opaque
from .launch import next_power_of_two, warps
from .quantized import Quantized


@triton.jit
def quantize_rows_kernel(p_x, p_data, p_scale, GELU: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    o_row = tl.program_id(0).to(tl.int64)
    o_columns = tl.arange(0, BLOCK)
    b_x = load_row(p_x + o_row * WIDTH, o_columns, WIDTH, BLOCK)
    if GELU:
        b_x = rounded(gelu_tanh(b_x), DTYPE)
    scale = e4m3_scale(tl.max(magnitude_bits(b_x), axis=0))
    tl.store(p_scale + o_row, scale)
    store_row(p_data + o_row * WIDTH, o_columns, e4m3(b_x, scale), WIDTH, BLOCK)


def _results(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    data = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return data, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@opaque("quantize_rows", _results)
def launch(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    data, scale = _results(x, gelu)
    width = x.shape[-1]
    block = next_power_of_two(width)
    quantize_rows_kernel[(x.numel() // width,)](
        x, data.view(torch.uint8), scale, GELU=gelu, WIDTH=width, BLOCK=block, num_warps=warps(block), num_stages=1
    )
    return data, scale


def quantize_rows(x: Tensor, *, fast: bool = False) -> Quantized:
    return Quantized(*launch(x, False))


def gelu_quantize(x: Tensor, *, fast: bool = False) -> Quantized:
    return Quantized(*launch(x, True))
