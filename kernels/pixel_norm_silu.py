"""Normalise every pixel over its channels and apply SiLU: what precedes each convolution of the video VAE."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import SHARED
from .dispatch import demand, operation
from .precision import rounded_once

EPS = 1e-8
MOST_CHANNELS = 4096
_SAMPLE = 256


def _twin() -> Callable:
    from .pixel_norm_silu_triton import pixel_norm_silu

    return pixel_norm_silu


def _fit(x: Tensor, out: Tensor, modulation: tuple[Tensor, Tensor] | None = None, *, fast: bool = False) -> Hashable:
    demand(x.dim() == 5 and x.shape == out.shape and x.numel() > 0, "shape")
    demand(x.shape[1] <= MOST_CHANNELS, "shape")
    batch, channels = x.shape[:2]
    for other in (out, *(modulation or ())):
        demand(other.dtype == x.dtype, "mixed dtypes")
        demand(other.device == x.device, "mixed devices")
    for vector in modulation or ():
        demand(vector.shape in ((1, channels, 1, 1, 1), (batch, channels, 1, 1, 1)), "shape of the modulation")
    return channels, modulation is None, fast


def _sample(
    x: Tensor, out: Tensor, modulation: tuple[Tensor, Tensor] | None = None, *, fast: bool = False
) -> tuple[tuple, dict]:
    height = max(1, _SAMPLE // x.shape[4])
    few = x[:, :, :1, :height, :_SAMPLE]
    return (few, torch.empty_like(few), modulation), {"fast": fast}


@operation(twin=_twin, fit=_fit, sample=_sample, contract=SHARED)
def pixel_norm_silu(
    x: Tensor, out: Tensor, modulation: tuple[Tensor, Tensor] | None = None, *, fast: bool = False
) -> Tensor:
    """Write SiLU(x / rms(x) * (1 + scale) + shift) to ``out``, the root mean square taken over channels.

    x, out: [B, C, T, H, W], any strides; they do not overlap. modulation: (shift, scale), each [B or 1, C, 1, 1, 1].
    Returns ``out``.

    Every operation rounds to the activation's dtype, as in the released implementation; ``fast`` rounds once. Writes in
    place, so it runs without gradients only.
    """
    if not fast:
        return _chain(x, out, modulation)
    return out.copy_(rounded_once(lambda x, modulation: _chain(x, torch.empty_like(x), modulation))(x, modulation))


def _chain(x: Tensor, out: Tensor, modulation: Any) -> Tensor:
    # the squares lie where the result will, so no third activation is made
    rms = torch.square(x, out=out).mean(dim=1, keepdim=True).add_(EPS).sqrt_()
    torch.div(x, rms, out=out)
    if modulation is not None:
        shift, scale = modulation
        out.mul_(1 + scale).add_(shift)
    return F.silu(out, inplace=True)
