"""Samplers: functions of a denoiser, the noisy tokens and the noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor

from ...kernels import wide
from ..av import AV

Denoise = Callable[[AV[Tensor], float], AV[Tensor]]
OnStep = Callable[[int, AV[Tensor]], None]
Sampler = Callable[[Denoise, AV[Tensor], Sequence[float], OnStep], AV[Tensor]]


def sample_euler(denoise: Denoise, x: AV[Tensor], sigmas: Sequence[float], on_step: OnStep) -> AV[Tensor]:
    """First-order steps along the flow (ltx-core 1.2, EulerDiffusionStep).

    sigmas: host floats that fall; the last may be 0. on_step(index, x0) is called after every step and may raise.
    Velocity and state are computed in float32 and rounded to the state's dtype in turn.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        x = x.map(partial(_euler_step, sigma=sigma, sigma_next=sigma_next), x0)
        on_step(index, x0)
    return x


def _euler_step(x: Tensor, x0: Tensor, *, sigma: float, sigma_next: float) -> Tensor:
    velocity = ((wide(x) - wide(x0)) / sigma).to(x.dtype)
    return (wide(x) + wide(velocity) * (sigma_next - sigma)).to(x.dtype)


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler by name. Raises ValueError for a name that is not in ``SAMPLERS``."""

    name: str

    def __post_init__(self):
        if self.name not in SAMPLERS:
            raise ValueError(f"there is no sampler {self.name!r}; choose {', '.join(SAMPLERS)}")


SAMPLERS: Mapping[str, Sampler] = {"euler": sample_euler}
