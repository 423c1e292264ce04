"""Combination of the guidance passes of one modality."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .contract import SHARED
from .dispatch import HALF, demand, demand_like, operation
from .precision import wide

_SAMPLE = 256


def _twin() -> Callable:
    from .guidance_combine_triton import guidance_combine

    return guidance_combine


def _fit(
    cond: Tensor,
    uncond: Tensor | None,
    perturbed: Tensor | None,
    isolated: Tensor | None,
    *,
    cfg: float,
    stg: float,
    modality: float,
    rescale: float,
) -> Hashable:
    passes = (cond, uncond, perturbed, isolated)
    demand_like(*passes)  # type: ignore[arg-type]
    demand(all(p is None or (p.shape == cond.shape and p.is_contiguous()) for p in passes), "passes not contiguous")
    demand(cond.numel() > 0, "empty")
    return tuple(p is None for p in passes), rescale != 0


def _sample(*passes: Tensor | None, **strengths: Any) -> tuple[tuple, dict]:
    return tuple(None if p is None else p[:, :_SAMPLE].contiguous() for p in passes), strengths


@operation(twin=_twin, fit=_fit, sample=_sample, contract=SHARED, dtypes=(*HALF, torch.float32))
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
    """Combine x0 predictions: cond + (cfg-1)(cond-uncond) + stg(cond-perturbed) + (modality-1)(cond-isolated).

    All passes: [B, T, C]; a pass that was not run is ``None`` and its term is left out. With ``rescale`` the result
    is scaled towards the standard deviation of ``cond`` (unbiased, over the whole tensor).
    Computed in float32, returned in cond's dtype (ltx-core 1.2, multi-modal guider).
    """
    c = wide(cond)
    guided = c
    if uncond is not None:
        guided = guided + (cfg - 1) * (c - wide(uncond))
    if perturbed is not None:
        guided = guided + stg * (c - wide(perturbed))
    if isolated is not None:
        guided = guided + (modality - 1) * (c - wide(isolated))
    if rescale != 0:
        # the quotient first: this order is bit-exact with the reference
        factor = rescale * (c.std() / guided.std()) + (1 - rescale)
        guided = guided * factor
    return guided.to(cond.dtype)
