"""The samplers by name: functions of a denoiser, the noisy tokens and the noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..av import AV
from .ancestral import sample_euler_ancestral
from .cfg_pp import sample_euler_cfg_pp
from .choice import SAMPLER_NAMES, SamplerChoice
from .euler import sample_euler
from .gradient_estimation import sample_gradient_estimation
from .noise import SamplerNoise
from .protocols import Denoise, OnStep
from .res2s import sample_res_2s

__all__ = ["NEEDS_UNCOND", "SAMPLERS", "Denoise", "OnStep", "Sampler", "SamplerChoice", "evaluations"]

# (denoise, x, sigmas, noise, choice, on_step) -> x at the last level. sigmas: host floats that fall strictly, the last
# may be 0. x, and either modality of it, keeps its dtype.
Sampler = Callable[[Denoise, AV[Tensor], Sequence[float], SamplerNoise, SamplerChoice, OnStep], AV[Tensor]]

SAMPLERS: Mapping[str, Sampler] = {
    "euler": sample_euler,
    "euler_ancestral": sample_euler_ancestral,
    "res_2s": sample_res_2s,
    "gradient_estimation": sample_gradient_estimation,
    "euler_cfg_pp": sample_euler_cfg_pp,
}
assert tuple(SAMPLERS) == SAMPLER_NAMES

# these read the unconditional prediction even where cfg is 1
NEEDS_UNCOND = frozenset({"euler_cfg_pp"})


def evaluations(name: str, sigmas: Sequence[float]) -> int:
    """How often the sampler calls the denoiser over the schedule."""
    num_steps = len(sigmas) - 1
    if name == "res_2s":
        return 2 * num_steps + (sigmas[-1] == 0.0)
    return num_steps
