"""CFG++: guidance decides where a step goes, the unguided prediction which noise it carries on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor

from ...kernels import wide
from ..av import AV
from .choice import SamplerChoice
from .noise import SamplerNoise
from .protocols import Denoise, OnStep

_SMALLEST_ALPHA = 2.0**-23  # float32's epsilon: at full noise the clean part has no share


def sample_euler_cfg_pp(
    denoise: Denoise,
    x: AV[Tensor],
    sigmas: Sequence[float],
    noise: SamplerNoise,
    choice: SamplerChoice,
    on_step: OnStep,
) -> AV[Tensor]:
    """Euler with CFG++ (ltx-core 1.2). One evaluation a step, with an unconditional pass; reads ``eta``, ``s_noise``.

    float32 arithmetic, stored in the state's dtype. Kept tokens are put back after every draw; a step to 0 takes x0
    itself and draws nothing.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma, step=index)
        if sigma_next == 0.0:
            x = x0
        else:
            weights = CfgPPWeights.between(sigma, sigma_next, choice.eta)
            moved = x.map(partial(_move, weights=weights), x0, denoise.unguided())
            if choice.eta > 0 and choice.s_noise > 0:
                fresh = noise.step(x)
                moved = denoise.blend(moved.map(partial(_add, amount=weights.fresh * choice.s_noise), fresh))
            x = moved.map(Tensor.type_as, x)
        on_step(index, x0)
    return x


@dataclass(frozen=True)
class CfgPPWeights:
    """One step as a sum: x0 by ``clean``, the noise that is in the sample by ``carried``, new noise by ``fresh``.

    The noise in a sample x is ``(x - alpha * unguided x0) / sigma``.
    """

    sigma: float
    alpha: float
    clean: float
    carried: float
    fresh: float

    @classmethod
    def between(cls, sigma: float, sigma_next: float, eta: float) -> CfgPPWeights:
        """Ancestral weights in the noise-to-signal ratio sigma / alpha, scaled back to the flow's samples."""
        alpha, alpha_next = max(1 - sigma, _SMALLEST_ALPHA), max(1 - sigma_next, _SMALLEST_ALPHA)
        ratio, ratio_next = sigma / alpha, sigma_next / alpha_next
        variance = ratio_next**2 * max(ratio**2 - ratio_next**2, 0.0) / ratio**2
        up = min(eta * math.sqrt(variance), ratio_next)
        down = math.sqrt(max(ratio_next**2 - up**2, 0.0))
        return cls(sigma, alpha, alpha_next, alpha_next * down, alpha_next * up)


def _move(x: Tensor, x0: Tensor, unguided: Tensor, *, weights: CfgPPWeights) -> Tensor:
    carried = (wide(x) - weights.alpha * wide(unguided)) / weights.sigma
    return weights.clean * wide(x0) + weights.carried * carried


def _add(x: Tensor, noise: Tensor, *, amount: float) -> Tensor:
    return x + amount * noise.to(x.dtype)
