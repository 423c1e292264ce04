"""Unfold channels into time, rows and columns: the up-sampling of the video VAE."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .contract import EXACT
from .dispatch import HALF, demand, demand_like, operation

Stride = tuple[int, int, int]


def _twin() -> Callable:
    from .depth_to_space_triton import depth_to_space

    return depth_to_space


def _fit(x: Tensor, stride: Stride, skip: Tensor | None = None) -> Hashable:
    demand(x.dim() == 5 and x.numel() > 0, "shape")
    demand_like(x, skip)
    return tuple(stride), skip is None


def _sample(x: Tensor, stride: Stride, skip: Tensor | None = None) -> tuple[tuple, dict]:
    few = (slice(None), slice(None), slice(0, 2), slice(0, 8), slice(0, 8))
    return (x[few], stride, None if skip is None else skip[few]), {}


@operation(twin=_twin, fit=_fit, sample=_sample, contract=EXACT, dtypes=(*HALF, torch.float32))
def depth_to_space(x: Tensor, stride: Stride, skip: Tensor | None = None) -> Tensor:
    """Unfold ``stride`` = (a, b, c): x [B, C * a * b * c, T, H, W] to [B, C, T * a, H * b, W * c], contiguous.

    Channel ((channel * a + i) * b + j) * c + k goes to offset (i, j, k). skip: [B, S * a * b * c, T, H, W] is unfolded
    likewise and added; its channels repeat as a block, output channel n takes skip channel n mod S.
    """
    y = _unfolded(x, stride)
    if skip is not None:
        added = _unfolded(skip, stride)
        y.unflatten(1, (-1, added.shape[1])).add_(added.unsqueeze(1))
    return y


def _unfolded(x: Tensor, stride: Stride) -> Tensor:
    n, channels, t, h, w = x.shape
    st, sh, sw = stride
    folds = math.prod(stride)
    y = x.reshape(n, channels // folds, st, sh, sw, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return y.reshape(n, channels // folds, t * st, h * sh, w * sw)
