"""RMS norm with a weight."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch.nn.functional as F
from torch import Tensor

from .contract import CLOSE
from .dispatch import demand, demand_like, operation

WIDEST = 16384
_SAMPLE = 256


def _twin() -> Callable:
    from .rms_norm_triton import rms_norm

    return rms_norm


def _fit(x: Tensor, weight: Tensor, eps: float) -> Hashable:
    demand(x.dim() == 3 and x.numel() > 0, "shape")
    demand(weight.shape == x.shape[2:] and x.shape[2] <= WIDEST, "shape")
    demand_like(x, weight)
    return x.shape[2]


def _sample(x: Tensor, weight: Tensor, eps: float) -> tuple[tuple, dict]:
    return (x[:, :_SAMPLE], weight, eps), {}


@operation(twin=_twin, fit=_fit, sample=_sample, contract=CLOSE)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Tokens divided by their root mean square, times the weight; rounded once.

    x: [B, T, C], any strides with unit last stride; weight: [C]. Returns x's shape, contiguous.
    """
    return F.rms_norm(x, x.shape[-1:], weight, eps).contiguous()
