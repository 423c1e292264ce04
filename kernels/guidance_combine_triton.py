"""``guidance_combine``: one pass over the predictions, and one before it for the standard deviations of a rescaling.

Means and squared deviations of blocks are merged in a fixed order (Chan's formula), so the result never changes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_triton import rounded
from .dispatch import opaque
from .launch import next_power_of_two, options

_BLOCK = 4096


@triton.jit
def _guided(p_cond, p_uncond, p_perturbed, p_isolated, o_cells, inside, cfg_1, stg, modality_1):
    """The conditional prediction and the combination of all."""
    b_cond = tl.load(p_cond + o_cells, mask=inside, other=0.0).to(tl.float32)
    b_guided = b_cond
    if p_uncond is not None:
        b_uncond = tl.load(p_uncond + o_cells, mask=inside, other=0.0).to(tl.float32)
        b_guided = b_guided + tl.cast(cfg_1, tl.float32) * (b_cond - b_uncond)
    if p_perturbed is not None:
        b_perturbed = tl.load(p_perturbed + o_cells, mask=inside, other=0.0).to(tl.float32)
        b_guided = b_guided + tl.cast(stg, tl.float32) * (b_cond - b_perturbed)
    if p_isolated is not None:
        b_isolated = tl.load(p_isolated + o_cells, mask=inside, other=0.0).to(tl.float32)
        b_guided = b_guided + tl.cast(modality_1, tl.float32) * (b_cond - b_isolated)
    return b_cond, b_guided


@triton.jit
def _store_moments(p_moments, o_block, b_x, inside, number):
    mean = tl.div_rn(tl.sum(b_x, axis=0), number)
    b_off = tl.where(inside, b_x - mean, 0.0)
    tl.store(p_moments + o_block * 2, mean)
    tl.store(p_moments + o_block * 2 + 1, tl.sum(b_off * b_off, axis=0))


@triton.jit
def guidance_moments_kernel(
    p_cond,
    p_uncond,
    p_perturbed,
    p_isolated,
    p_cond_moments,
    p_moments,
    count,
    cfg_1,
    stg,
    modality_1,
    BLOCK: tl.constexpr,
):
    """Mean and sum of squared deviations of each block."""
    o_block = tl.program_id(0).to(tl.int64)
    o_cells = o_block * BLOCK + tl.arange(0, BLOCK)
    inside = o_cells < count
    b_cond, b_guided = _guided(p_cond, p_uncond, p_perturbed, p_isolated, o_cells, inside, cfg_1, stg, modality_1)
    number = tl.sum(inside.to(tl.float32), axis=0)
    _store_moments(p_cond_moments, o_block, b_cond, inside, number)
    _store_moments(p_moments, o_block, b_guided, inside, number)


@triton.jit
def _deviation(p_moments, blocks, count, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The unbiased standard deviation of all blocks."""
    o_blocks = tl.arange(0, BLOCKS)
    inside = o_blocks < blocks
    b_mean = tl.load(p_moments + o_blocks * 2, mask=inside, other=0.0)
    b_square = tl.load(p_moments + o_blocks * 2 + 1, mask=inside, other=0.0)
    b_left = count - o_blocks.to(tl.int64) * BLOCK
    b_number = tl.where(inside, tl.where(b_left < BLOCK, b_left, BLOCK), 0).to(tl.float32)
    total = tl.sum(b_number, axis=0)
    mean = tl.div_rn(tl.sum(b_number * b_mean, axis=0), total)
    b_off = b_mean - mean
    return tl.sqrt_rn(tl.div_rn(tl.sum(b_square + b_number * b_off * b_off, axis=0), total - 1.0))


@triton.jit(do_not_specialize=["blocks"])
def guidance_combine_kernel(
    p_cond,
    p_uncond,
    p_perturbed,
    p_isolated,
    p_cond_moments,
    p_moments,
    p_out,
    count,
    blocks,
    cfg_1,
    stg,
    modality_1,
    rescale,
    rest,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    o_cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o_cells < count
    _, b_guided = _guided(p_cond, p_uncond, p_perturbed, p_isolated, o_cells, inside, cfg_1, stg, modality_1)
    if p_moments is not None:
        wanted = _deviation(p_cond_moments, blocks, count, BLOCK, BLOCKS)
        quotient = tl.div_rn(wanted, _deviation(p_moments, blocks, count, BLOCK, BLOCKS))
        b_guided = b_guided * (tl.cast(rescale, tl.float32) * quotient + tl.cast(rest, tl.float32))
    tl.store(p_out + o_cells, rounded(b_guided, DTYPE).to(DTYPE), mask=inside)


def _result(
    cond: Tensor,
    uncond: Tensor | None,
    perturbed: Tensor | None,
    isolated: Tensor | None,
    cfg: float,
    stg: float,
    modality: float,
    rescale: float,
) -> Tensor:
    return cond.new_empty(cond.shape)


@opaque(
    "guidance_combine",
    "(Tensor cond, Tensor? uncond, Tensor? perturbed, Tensor? isolated, float cfg, float stg, float modality, "
    "float rescale) -> Tensor",
    _result,
)
def launch(
    cond: Tensor,
    uncond: Tensor | None,
    perturbed: Tensor | None,
    isolated: Tensor | None,
    cfg: float,
    stg: float,
    modality: float,
    rescale: float,
) -> Tensor:
    out = _result(cond, uncond, perturbed, isolated, cfg, stg, modality, rescale)
    count = cond.numel()
    blocks = -(-count // _BLOCK)
    passes, factors = (cond, uncond, perturbed, isolated), (cfg - 1, stg, modality - 1)
    shape = {"BLOCK": _BLOCK, **options(_BLOCK)}
    moments: tuple = (None, None)
    if rescale != 0:
        moments = tuple(cond.new_empty(blocks, 2, dtype=torch.float32) for _ in range(2))
        guidance_moments_kernel[(blocks,)](*passes, *moments, count, *factors, **shape)
    guidance_combine_kernel[(blocks,)](
        *passes,
        *moments,
        out,
        count,
        blocks,
        *factors,
        rescale,
        1 - rescale,
        BLOCKS=next_power_of_two(blocks),
        **shape,
    )
    return out


def guidance_combine(
    cond: Tensor,
    uncond: Tensor | None,
    perturbed: Tensor | None,
    isolated: Tensor | None,
    *,
    cfg: float,
    stg: float,
    modality: float,
    rescale: float,
) -> Tensor:
    return launch(cond, uncond, perturbed, isolated, float(cfg), float(stg), float(modality), float(rescale))
