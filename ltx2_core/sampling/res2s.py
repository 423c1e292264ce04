"""res_2s: a second-order exponential integrator with fresh noise at every midpoint and step.

ltx-core 1.2 (`Res2sDiffusionStep` and the HQ pipeline's loop). All scalars are host floats: nothing waits for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor

from ...kernels import res2s_update
from ..av import AV
from .choice import SamplerChoice
from .noise import SamplerNoise, finest_dtype
from .phi import phi
from .protocols import Denoise, OnStep

LAST_SIGMA = 0.0011  # stands in for a closing 0, whose step in log space would be infinite

_C2 = 0.5  # where the midpoint lies, in log space
_LARGEST_UP = 0.9999  # share of the noise that one step may replace
_BONG_BELOW_H = 0.5
_BONG_ABOVE_SIGMA = 0.03


def sample_res_2s(
    denoise: Denoise,
    x: AV[Tensor],
    sigmas: Sequence[float],
    noise: SamplerNoise,
    choice: SamplerChoice,
    on_step: OnStep,
) -> AV[Tensor]:
    """Two evaluations a step, and one more at ``LAST_SIGMA`` if the schedule ends at 0.

    Reads ``eta``, ``substep_eta`` and ``bong``. float64 arithmetic (float32 where the device has none), stored in the
    state's dtype. The closing evaluation has step index ``len(sigmas) - 1``; its x0 is what the last step reports.
    Raises ValueError when a schedule that ends at 0 comes from a level that is not above ``LAST_SIGMA``.
    """
    num_steps = len(sigmas) - 1
    ends_clean = sigmas[-1] == 0.0
    levels = (*sigmas[:-1], LAST_SIGMA) if ends_clean else tuple(sigmas)
    if not levels[-2] > levels[-1]:
        raise ValueError(f"res_2s needs the level before 0 to be above {LAST_SIGMA}, found {levels[-2]}")
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x, x0 = _step(denoise, x, sigma, sigma_next, index, noise, choice)
        if ends_clean and index == num_steps - 1:
            x = x0 = denoise(x, LAST_SIGMA, step=num_steps)
        on_step(index, x0)
    return x


def _step(
    denoise: Denoise,
    x: AV[Tensor],
    sigma: float,
    sigma_next: float,
    index: int,
    noise: SamplerNoise,
    choice: SamplerChoice,
) -> tuple[AV[Tensor], AV[Tensor]]:
    """The state at ``sigma_next``, and x0 at the midpoint."""
    weights = Res2sWeights.of(math.log(sigma / sigma_next))
    middle_sigma = math.sqrt(sigma * sigma_next)

    anchor = x.map(_widest)
    x0 = denoise(x, sigma, step=index).map(_widest)
    middle = anchor.map(weights.to_middle, x0)
    still = choice.substep_eta == 0.0
    renoise = partial(sde_step, sigma=sigma, sigma_next=middle_sigma, eta=choice.substep_eta, terminal=still)
    middle = denoise.blend(anchor.map(renoise, middle, AV() if still else noise.substep(x)))
    if choice.bong and weights.h < _BONG_BELOW_H and sigma > _BONG_ABOVE_SIGMA:
        anchor = middle.map(weights.refine_anchor, x0)

    middle_x0 = denoise(middle.map(Tensor.type_as, x), middle_sigma, step=index, midpoint=True)
    end = anchor.map(weights.to_end, x0, middle_x0.map(_widest))
    still = choice.eta == 0.0
    renoise = partial(sde_step, sigma=sigma, sigma_next=sigma_next, eta=choice.eta, terminal=still)
    end = anchor.map(renoise, end, AV() if still else noise.step(x))
    return denoise.blend(end).map(Tensor.type_as, x), middle_x0


@dataclass(frozen=True)
class Res2sWeights:
    """Runge-Kutta weights of a step of length ``h`` in log sigma: a21 leads to the midpoint, b1 and b2 to the end."""

    h: float
    a21: float
    b1: float
    b2: float

    @classmethod
    def of(cls, h: float) -> Res2sWeights:
        b2 = phi(2, -h) / _C2
        return cls(h, a21=_C2 * phi(1, -_C2 * h), b1=phi(1, -h) - b2, b2=b2)

    def to_middle(self, anchor: Tensor, x0: Tensor) -> Tensor:
        """The midpoint from the step's start and its x0."""
        return anchor + self.h * self.a21 * (x0 - anchor)

    def to_end(self, anchor: Tensor, x0: Tensor, middle_x0: Tensor) -> Tensor:
        """The step's end from its start and the x0 found at start and midpoint."""
        return anchor + self.h * (self.b1 * (x0 - anchor) + self.b2 * (middle_x0 - anchor))

    def refine_anchor(self, middle: Tensor, x0: Tensor) -> Tensor:
        """The start that leads to ``middle`` without noise: the fixed point of the reference's 100 "bong" rounds."""
        pull = self.h * self.a21
        return (middle - pull * x0) / (1 - pull)


@dataclass(frozen=True)
class SdeWeights:
    """A variance-preserving renoising to one level: ``kept ** 2 + fresh ** 2`` is that level squared.

    kept: factor of the noise that stays. fresh: factor of new unit noise. alpha_ratio: factor of the clean part.
    """

    kept: float
    fresh: float
    alpha_ratio: float

    @classmethod
    def of(cls, sigma_next: float, eta: float) -> SdeWeights:
        fresh = min(eta, _LARGEST_UP) * sigma_next
        kept = math.sqrt(max(sigma_next**2 - fresh**2, 0.0))
        return cls(kept, fresh, (1 - sigma_next) + kept)

    @property
    def sigma_down(self) -> float:
        """The level whose sample, scaled by alpha_ratio, leaves room for the fresh noise."""
        return self.kept / self.alpha_ratio


def sde_step(
    x: Tensor,
    target: Tensor,
    noise: Tensor | None,
    *,
    sigma: float,
    sigma_next: float,
    eta: float = 0.5,
    terminal: bool = False,
) -> Tensor:
    """``target``, the deterministic result at ``sigma_next`` of a step from ``x`` at ``sigma``, with part of its noise
    replaced.

    terminal: nothing is replaced (eta or sigma_next is 0); the target is returned before any coefficient is formed and
    noise may be None. The caller decides it from host floats. Computes in and returns x's dtype.
    """
    if terminal:
        return target.to(x.dtype)
    assert noise is not None
    weights = SdeWeights.of(sigma_next, eta)
    return res2s_update(
        x,
        target,
        noise,
        sigma=sigma,
        sigma_next=sigma_next,
        sigma_down=weights.sigma_down,
        alpha_ratio=weights.alpha_ratio,
        fresh=weights.fresh,
    )


def _widest(x: Tensor) -> Tensor:
    return x.to(finest_dtype(x.device))
