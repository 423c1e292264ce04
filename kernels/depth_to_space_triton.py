"""``depth_to_space``: a program writes part of some output rows."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .device_triton import rounded
from .dispatch import opaque
from .launch import next_power_of_two, options

# numbers that a program holds, and columns of them
_HELD = 4096
_FEWEST_COLUMNS, _MOST_COLUMNS = 64, 1024


@triton.jit
def _columns(p_rows, channel, start, columns, here, C: tl.constexpr, BLOCK: tl.constexpr):
    """Part of some rows, [LINES, BLOCK], whose columns are in turn from C channels. channel: how far they are apart."""
    if C == 2:
        # both channels in wide loads, and then mixed
        o_pairs = start // 2 + tl.arange(0, BLOCK // 2)[None, :]
        inside = here & (o_pairs < columns // 2)
        b_even = tl.load(p_rows + o_pairs, mask=inside, other=0.0)
        b_odd = tl.load(p_rows + channel + o_pairs, mask=inside, other=0.0)
        b_x = tl.interleave(b_even, b_odd)
    else:
        o_columns = start + tl.arange(0, BLOCK)[None, :]
        inside = here & (o_columns < columns)
        b_x = tl.load(p_rows + (o_columns % C) * channel + o_columns // C, mask=inside, other=0.0)
    return b_x.to(tl.float32)


@triton.jit(do_not_specialize=["frames", "rows", "blocks", "lines"])
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
    lines,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """channels to columns: sizes of the output, which has so many lines; blocks: parts of each."""
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    o_program = tl.program_id(0)
    start = (o_program % blocks) * BLOCK
    o_line = (o_program // blocks) * LINES + tl.arange(0, LINES)[:, None]
    here = o_line < lines
    o_row = o_line % rows
    o_picture = o_line // rows
    o_frame = o_picture % frames
    o_channel = (o_picture // frames) % channels
    o_batch = (o_picture // frames // channels).to(tl.int64)
    o_from_frame, o_from_row = (o_frame // A).to(tl.int64), (o_row // B).to(tl.int64)
    o_fold = ((o_frame % A) * B + o_row % B) * C

    o_from = (o_channel * (A * B * C) + o_fold).to(tl.int64)
    p_rows = p_x + o_batch * x_batch + o_from_frame * x_frame + o_from_row * x_row + o_from * x_channel
    b_x = _columns(p_rows, x_channel, start, columns, here, C, BLOCK)
    if p_skip is not None:
        o_from = ((o_channel % skip_channels) * (A * B * C) + o_fold).to(tl.int64)
        p_rows = p_skip + o_batch * skip_batch + o_from_frame * skip_frame + o_from_row * skip_row
        b_skip = _columns(p_rows + o_from * skip_channel, skip_channel, start, columns, here, C, BLOCK)
        b_x = rounded(b_x + b_skip, DTYPE)
    o_columns = start + tl.arange(0, BLOCK)[None, :]
    p_to = p_out + o_line.to(tl.int64) * columns + o_columns
    tl.store(p_to, b_x.to(DTYPE), mask=here & (o_columns < columns))


def _result(x: Tensor, stride: list[int], skip: Tensor | None) -> Tensor:
    batch, channels, t, h, w = x.shape
    a, b, c = stride
    return x.new_empty(batch, channels // math.prod(stride), t * a, h * b, w * c)


@opaque("depth_to_space", "(Tensor x, SymInt[] stride, Tensor? skip) -> Tensor", _result)
def launch(x: Tensor, stride: list[int], skip: Tensor | None) -> Tensor:
    out = _result(x, stride, skip)
    a, b, c = stride
    batch, channels, frames, rows, columns = out.shape
    lines, block = batch * channels * frames * rows, _part(columns)
    blocks = -(-columns // block)
    depth_to_space_kernel[(-(-lines // (_HELD // block)) * blocks,)](
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
        lines,
        A=a,
        B=b,
        C=c,
        LINES=_HELD // block,
        BLOCK=block,
        **options(_HELD),
    )
    return out


def _part(columns: int) -> int:
    """How much of a line a program takes: a part that leaves no rest, if that is not too small."""
    divisor = columns & -columns
    return min(_MOST_COLUMNS, divisor if divisor >= _FEWEST_COLUMNS else max(2, next_power_of_two(columns)))


def depth_to_space(x: Tensor, stride: tuple[int, int, int], skip: Tensor | None = None) -> Tensor:
    return launch(x, list(stride), skip)
