"""Combination of the guidance passes of one modality."""

from __future__ import annotations

from torch import Tensor

from .precision import wide


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
