"""``depth_to_space``: a program writes part of one output row."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .device_triton import rounded
from .dispatch import opaque
from .launch import next_power_of_two, options

_MOST_COLUMNS = 1024


@triton.jit(do_not_specialize=["frames", "rows", "blocks"])
def depth_to_space_kernel(
    p_x,
    x_batch,
    x_channel,
    x_frame,
    x_row,
    p_skip,
    skip_batch,
    skip_channel,
    skip_frame,
    skip_row,
    p_out,
    channels,
    skip_channels,
    frames,
    rows,
    columns,
    blocks,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """channels to columns: sizes of the output."""
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    o_program = tl.program_id(0).to(tl.int64)
    o_line = o_program // blocks
    o_columns = (o_program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = o_columns < columns
    o_row = o_line % rows
    o_frame = (o_line // rows) % frames
    o_channel = (o_line // rows // frames) % channels
    o_batch = o_line // rows // frames // channels

    o_fold = ((o_frame % A) * B + o_row % B) * C + o_columns % C
    o_from = o_channel * (A * B * C) + o_fold
    p_from = p_x + o_batch * x_batch + (o_frame // A) * x_frame + (o_row // B) * x_row
    b_x = tl.load(p_from + o_from * x_channel + o_columns // C, mask=inside, other=0.0).to(tl.float32)
    if p_skip is not None:
        o_from = (o_channel % skip_channels) * (A * B * C) + o_fold
        p_from = p_skip + o_batch * skip_batch + (o_frame // A) * skip_frame + (o_row // B) * skip_row
        b_skip = tl.load(p_from + o_from * skip_channel + o_columns // C, mask=inside, other=0.0).to(tl.float32)
        b_x = rounded(b_x + b_skip, DTYPE)
    tl.store(p_out + o_line * columns + o_columns, b_x.to(DTYPE), mask=inside)


def _result(x: Tensor, stride: list[int], skip: Tensor | None) -> Tensor:
    batch, channels, t, h, w = x.shape
    a, b, c = stride
    return x.new_empty(batch, channels // math.prod(stride), t * a, h * b, w * c)


@opaque("depth_to_space", "(Tensor x, SymInt[] stride, Tensor? skip) -> Tensor", _result)
def launch(x: Tensor, stride: list[int], skip: Tensor | None) -> Tensor:
    out = _result(x, stride, skip)
    a, b, c = stride
    batch, channels, frames, rows, columns = out.shape
    block = min(_MOST_COLUMNS, next_power_of_two(columns))
    blocks = -(-columns // block)
    depth_to_space_kernel[(batch * channels * frames * rows * blocks,)](
        x,
        *x.stride()[:4],
        skip,
        *((0,) * 4 if skip is None else skip.stride()[:4]),
        out,
        channels,
        1 if skip is None else skip.shape[1] // math.prod(stride),
        frames,
        rows,
        columns,
        blocks,
        A=a,
        B=b,
        C=c,
        BLOCK=block,
        **options(block),
    )
    return out


def depth_to_space(x: Tensor, stride: tuple[int, int, int], skip: Tensor | None = None) -> Tensor:
    return launch(x, list(stride), skip)
