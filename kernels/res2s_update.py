"""The renoising step of res_2s."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from .contract import CLOSE
from .dispatch import WIDE, demand, operation

_SAMPLE = 4096


def _twin() -> Callable:
    from .res2s_update_triton import res2s_update

    return res2s_update


def _fit(
    x: Tensor,
    target: Tensor,
    noise: Tensor,
    *,
    sigma: float,
    sigma_next: float,
    sigma_down: float,
    alpha_ratio: float,
    fresh: float,
) -> Hashable:
    for other in (target, noise):
        demand(other.shape == x.shape and other.is_contiguous(), "not contiguous")
        demand(other.device == x.device, "mixed devices")
    demand(x.is_contiguous() and x.numel() > 0, "not contiguous")
    demand(target.dtype == x.dtype and noise.is_floating_point(), "mixed dtypes")
    return noise.dtype


def _sample(x: Tensor, target: Tensor, noise: Tensor, **levels: Any) -> tuple[tuple, dict]:
    return tuple(t.reshape(-1)[:_SAMPLE] for t in (x, target, noise)), levels


@operation(twin=_twin, fit=_fit, sample=_sample, contract=CLOSE, dtypes=WIDE)
def res2s_update(
    x: Tensor,
    target: Tensor,
    noise: Tensor,
    *,
    sigma: float,
    sigma_next: float,
    sigma_down: float,
    alpha_ratio: float,
    fresh: float,
) -> Tensor:
    """Take the step from x to target apart into clean part and direction, and go on to ``sigma_down`` with fresh noise.

    d = (x - target) / (sigma - sigma_next); alpha_ratio * (x - sigma * d + sigma_down * d) + fresh * noise.

    x, target: any shape, float64 or float32; noise: the same shape, rounded or widened to x's dtype first. Returns x's
    dtype; every operation rounds to it in turn (ltx-core 1.2, `Res2sDiffusionStep`).
    """
    direction = (x - target) / (sigma - sigma_next)
    clean = x - sigma * direction
    return alpha_ratio * (clean + sigma_down * direction) + fresh * noise.to(x.dtype)
