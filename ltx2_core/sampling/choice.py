"""A sampler and its settings as the user chose them. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

FOLLOW_NOISE_SEED = "follow"
NOISE_KINDS = ("normalised", "plain")

# what ltx-pipelines 1.2 uses; samplers without noise of their own read none of it
_REFERENCE: Mapping[str, Mapping[str, float | int | str]] = {
    "euler": {"eta": 0.0, "noise_kind": "plain", "sde_seed": -1},
    "euler_ancestral": {"eta": 1.0, "noise_kind": "plain", "sde_seed": FOLLOW_NOISE_SEED},
    "res_2s": {"eta": 0.5, "noise_kind": "normalised", "sde_seed": -1},
    "gradient_estimation": {"eta": 0.0, "noise_kind": "plain", "sde_seed": -1},
    "euler_cfg_pp": {"eta": 1.0, "noise_kind": "plain", "sde_seed": -1},
}
SAMPLER_NAMES = tuple(_REFERENCE)


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler by name, and its settings. A setting that the sampler does not read has no effect.

    eta: share of each step that is replaced by fresh noise, 0 to 1 (euler_ancestral, res_2s, euler_cfg_pp; the
    last is ComfyUI's sampler of that name at 0 and its ancestral sibling at 1).
    substep_eta: the same for the midpoint of a step (res_2s).
    s_noise: strength of the fresh noise (euler_ancestral, euler_cfg_pp).
    bong: whether a noised midpoint moves the start of its step (res_2s).
    gamma: how far the velocity is extrapolated, 1 = plain Euler (gradient_estimation).
    noise_kind: "normalised" (float64 draws of mean 0 and deviation 1) or "plain" (draws in the state's dtype).
    sde_seed: seed of the fresh noise, whatever the noise seed is; "follow" derives it from the noise seed.

    eta, noise_kind and sde_seed left out (None) take the reference's value for the sampler (ltx-pipelines 1.2).
    Raises ValueError for an unknown name or a setting out of range.
    """

    name: str
    _: KW_ONLY
    eta: float = None  # type: ignore[assignment]
    substep_eta: float = 0.5
    s_noise: float = 1.0
    bong: bool = True
    gamma: float = 2.0
    noise_kind: str = None  # type: ignore[assignment]
    sde_seed: int | str = None  # type: ignore[assignment]

    def __post_init__(self):
        if self.name not in _REFERENCE:
            raise ValueError(f"there is no sampler {self.name!r}; choose {', '.join(_REFERENCE)}")
        for setting, value in _REFERENCE[self.name].items():
            if getattr(self, setting) is None:
                object.__setattr__(self, setting, value)
        self._check_range("eta", 1.0)
        self._check_range("substep_eta", 1.0)
        self._check_range("s_noise", 100.0)
        self._check_range("gamma", 10.0)
        if not isinstance(self.bong, bool):
            raise ValueError(f"bong must be true or false, found {self.bong!r}")
        if self.noise_kind not in NOISE_KINDS:
            raise ValueError(f"there is no noise kind {self.noise_kind!r}; choose {', '.join(NOISE_KINDS)}")
        self._check_seed()

    def _check_range(self, setting: str, highest: float) -> None:
        value = getattr(self, setting)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and 0 <= value <= highest):
            raise ValueError(f"{setting} must be a number from 0 to {highest:g}, found {value!r}")

    def _check_seed(self) -> None:
        seed = self.sde_seed
        whole = isinstance(seed, int) and not isinstance(seed, bool)
        if seed != FOLLOW_NOISE_SEED and not (whole and -(2**63) <= int(seed) < 2**64):
            raise ValueError(
                f"sde_seed must be a whole number of 64 bits (-1 is the reference's) or {FOLLOW_NOISE_SEED!r}, "
                f"found {seed!r}"
            )
