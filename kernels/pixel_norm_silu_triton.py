"""``pixel_norm_silu``: a program holds some pixels with all their channels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_triton import narrowed, product, quick_inverse, quick_sigmoid, rounded, rounded_in_pairs, total, widened
from .dispatch import opaque
from .launch import next_power_of_two, options
from .pixel_norm_silu import EPS

# numbers that a program holds; pixels side by side, which are neighbours in memory: from one load of a thread to a cache line
_HELD = 16384
_FEWEST_PIXELS, _MOST_PIXELS = 8, 64


@triton.jit(do_not_specialize=["frames", "height", "blocks"])
def pixel_norm_silu_kernel(
    p_x,
    x_batch,
    x_channel,
    x_frame,
    x_row,
    x_column,
    p_out,
    out_batch,
    out_channel,
    out_frame,
    out_row,
    out_column,
    p_shift,
    shift_batch,
    shift_channel,
    p_scale,
    scale_batch,
    scale_channel,
    frames,
    height,
    width,
    blocks,
    eps,
    FAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
):
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    o_program = tl.program_id(0).to(tl.int64)
    o_line = o_program // blocks
    o_row = o_line % height
    o_frame = (o_line // height) % frames
    o_batch = o_line // height // frames
    o_columns = (o_program % blocks) * PIXELS + tl.arange(0, PIXELS)[None, :]
    o_channels = tl.arange(0, BLOCK)[:, None].to(tl.int64)
    known = o_channels < CHANNELS
    here = known & (o_columns < width)
    p_from = p_x + o_batch * x_batch + o_frame * x_frame + o_row * x_row + o_columns * x_column
    p_to = p_out + o_batch * out_batch + o_frame * out_frame + o_row * out_row + o_columns * out_column

    # what is rounded after every operation is computed in 16 bits
    KEPT: tl.constexpr = tl.float32 if FAST else DTYPE
    h_x = tl.load(p_from + o_channels * x_channel, mask=here, other=0.0).to(KEPT)
    if p_scale is not None:
        o_vector = tl.arange(0, BLOCK)
        inside = o_vector < CHANNELS
        h_scale = tl.load(p_scale + o_batch * scale_batch + o_vector * scale_channel, mask=inside, other=0.0)
        h_shift = tl.load(p_shift + o_batch * shift_batch + o_vector * shift_channel, mask=inside, other=0.0)
        h_factor = rounded(1.0 + h_scale.to(tl.float32), KEPT).to(KEPT)[:, None]
        h_shift = h_shift.to(KEPT)[:, None]
    b_mean = tl.sum(widened(product(h_x, h_x)), axis=0) * (1.0 / CHANNELS)
    b_mean = rounded_in_pairs(rounded_in_pairs(b_mean, KEPT) + tl.cast(eps, tl.float32), KEPT)
    # no root and no quotient of numbers of 8 bits is as near to the middle of two others as these are to it
    b_rms = rounded_in_pairs(tl.sqrt(b_mean), KEPT)
    h_y = narrowed(widened(h_x) * quick_inverse(b_rms)[None, :], KEPT)
    if p_scale is not None:
        h_y = total(product(h_y, h_factor), h_shift)
    b_y = widened(h_y)
    b_y = b_y * quick_sigmoid(b_y)
    tl.store(p_to + o_channels * out_channel, rounded(b_y, DTYPE).to(DTYPE), mask=here)


def _nothing(x: Tensor, out: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, fast: bool) -> None:
    pass


@opaque(
    "pixel_norm_silu",
    "(Tensor x, Tensor(a!) out, Tensor? shift, Tensor? scale, float eps, bool fast) -> ()",
    _nothing,
    mutates=("out",),
)
def launch(x: Tensor, out: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, fast: bool) -> None:
    batch, channels = x.shape[:2]
    sizes, x_strides, out_strides = _merged(x, out)
    block = next_power_of_two(channels)
    pixels = min(_MOST_PIXELS, max(_FEWEST_PIXELS, _HELD // block))
    blocks = -(-sizes[2] // pixels)
    pixel_norm_silu_kernel[(batch * sizes[0] * sizes[1] * blocks,)](
        x,
        *x.stride()[:2],
        *x_strides,
        out,
        *out.stride()[:2],
        *out_strides,
        shift,
        *_vector_strides(shift),
        scale,
        *_vector_strides(scale),
        *sizes,
        blocks,
        eps,
        FAST=fast,
        CHANNELS=channels,
        BLOCK=block,
        PIXELS=pixels,
        # 64 numbers a thread, as each of a channel's threads repeats what is done once for it: a quarter faster than 32
        **options(block * pixels // 4),
    )


def _merged(x: Tensor, out: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Sizes, and strides of both, of frames, rows and columns; axes that follow each other in memory become one.

    A line of a program's pixels then ends at the end of a picture or clip, not of every row.
    """
    sizes, x_strides, out_strides = (list(values[2:]) for values in (x.shape, x.stride(), out.stride()))
    for outer in (1, 0):
        follows = all(stride[outer] == stride[2] * sizes[2] for stride in (x_strides, out_strides))
        if follows and (outer == 1 or sizes[1] == 1):
            sizes[2] *= sizes[outer]
            sizes[outer] = 1
    return sizes, x_strides, out_strides


def _vector_strides(vector: Tensor | None) -> tuple[int, int]:
    if vector is None:
        return 0, 0
    return (0 if vector.shape[0] == 1 else vector.stride(0)), vector.stride(1)


def pixel_norm_silu(
    x: Tensor, out: Tensor, modulation: tuple[Tensor, Tensor] | None = None, *, fast: bool = False
) -> Tensor:
    shift, scale = (None, None) if modulation is None else modulation
    launch(x, out, shift, scale, EPS, fast)
    return out
