"""Euler steps that overshoot towards clean and return with fresh noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor

from ...kernels import wide
from ..av import AV
from .choice import SamplerChoice
from .noise import SamplerNoise
from .protocols import Denoise, OnStep


def sample_euler_ancestral(
    denoise: Denoise,
    x: AV[Tensor],
    sigmas: Sequence[float],
    noise: SamplerNoise,
    choice: SamplerChoice,
    on_step: OnStep,
) -> AV[Tensor]:
    """Ancestral Euler in its rectified-flow form (ltx-core 1.2). One evaluation a step; reads ``eta``, ``s_noise``.

    float32 arithmetic, stored in the state's dtype. Kept tokens are put back after every draw; a step to 0 takes x0
    itself and draws nothing.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma, step=index)
        if sigma_next == 0.0:
            x = x0
        else:
            sigma_down = sigma_next * (1 + (sigma_next / sigma - 1) * choice.eta)
            moved = x.map(partial(_towards, keep=sigma_down / sigma), x0)
            if choice.eta > 0:
                scale, amount = renoising(sigma_next, sigma_down)
                fresh = noise.step(x)
                moved = denoise.blend(moved.map(partial(_renoised, scale=scale, amount=amount * choice.s_noise), fresh))
            x = moved.map(Tensor.type_as, x)
        on_step(index, x0)
    return x


def renoising(sigma_next: float, sigma_down: float) -> tuple[float, float]:
    """How a sample at ``sigma_down`` returns to ``sigma_next``: its own factor, and the amount of unit noise to add.

    The factor restores the clean part to ``1 - sigma_next``, the noise restores the variance to ``sigma_next ** 2``.
    """
    scale = (1 - sigma_next) / (1 - sigma_down)
    return scale, math.sqrt(max(sigma_next**2 - sigma_down**2 * scale**2, 0.0))


def _towards(x: Tensor, x0: Tensor, *, keep: float) -> Tensor:
    return keep * wide(x) + (1 - keep) * wide(x0)


def _renoised(x: Tensor, noise: Tensor, *, scale: float, amount: float) -> Tensor:
    return scale * x + amount * noise.to(x.dtype)
