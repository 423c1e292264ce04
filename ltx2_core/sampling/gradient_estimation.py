"""Euler steps whose velocity is extrapolated from the step before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor

from ...kernels import wide
from ..av import AV
from .choice import SamplerChoice
from .euler import euler_step, velocity_of
from .noise import SamplerNoise
from .protocols import Denoise, OnStep


def sample_gradient_estimation(
    denoise: Denoise,
    x: AV[Tensor],
    sigmas: Sequence[float],
    noise: SamplerNoise,
    choice: SamplerChoice,
    on_step: OnStep,
) -> AV[Tensor]:
    """Gradient estimation (ltx-core 1.2). One evaluation a step; reads ``gamma``.

    The first step is plain Euler, a step to 0 takes x0 itself. What is carried on is the velocity that was found, not
    the corrected one. float32 arithmetic, velocities and state rounded to the state's dtype.
    """
    before: AV[Tensor] | None = None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma, step=index)
        if sigma_next == 0.0:
            x = x0
        else:
            velocity = x.map(partial(velocity_of, sigma=sigma), x0)
            target = x0
            if before is not None:
                target = x.map(partial(_corrected, sigma=sigma, gamma=choice.gamma), velocity, before)
            x = x.map(partial(euler_step, sigma=sigma, sigma_next=sigma_next), target)
            before = velocity
        on_step(index, x0)
    return x


def _corrected(x: Tensor, velocity: Tensor, before: Tensor, *, sigma: float, gamma: float) -> Tensor:
    """The x0 to which the extrapolated velocity points."""
    estimate = gamma * (wide(velocity) - wide(before)) + wide(before)
    return (wide(x) - sigma * wide(estimate.to(x.dtype))).to(x.dtype)
