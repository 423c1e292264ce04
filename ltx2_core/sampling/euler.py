"""First-order steps along the flow, without noise of their own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor

from ...kernels import wide
from ..av import AV
from .choice import SamplerChoice
from .noise import SamplerNoise
from .protocols import Denoise, OnStep


def sample_euler(
    denoise: Denoise,
    x: AV[Tensor],
    sigmas: Sequence[float],
    noise: SamplerNoise,
    choice: SamplerChoice,
    on_step: OnStep,
) -> AV[Tensor]:
    """Euler (ltx-core 1.2, EulerDiffusionStep). One evaluation a step, no settings.

    Velocity and state are computed in float32 and rounded to the state's dtype in turn.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma, step=index)
        x = x.map(partial(euler_step, sigma=sigma, sigma_next=sigma_next), x0)
        on_step(index, x0)
    return x


def velocity_of(x: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """The flow's direction at ``x`` towards more noise, in x's dtype."""
    return ((wide(x) - wide(x0)) / sigma).to(x.dtype)


def euler_step(x: Tensor, x0: Tensor, *, sigma: float, sigma_next: float) -> Tensor:
    """``x`` at ``sigma_next`` if its velocity at ``sigma`` holds until there."""
    return (wide(x) + wide(velocity_of(x, x0, sigma)) * (sigma_next - sigma)).to(x.dtype)
