"""What a sampler needs from outside: a denoiser, and someone to tell about its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..av import AV

# (step index, x0 of that step), called once after every step; may raise to stop the run
OnStep = Callable[[int, AV[Tensor]], None]


class Denoise(Protocol):
    """Estimates clean tokens. All tensors are [B, T, C], one per modality."""

    def __call__(self, x: AV[Tensor], sigma: float, *, step: int, midpoint: bool = False) -> AV[Tensor]:
        """The guided x0 of ``x`` at ``sigma`` in x's dtype, kept tokens put back.

        step: index of the step that asks. midpoint: asks inside the step, at a level that is not in the schedule.
        """

    def unguided(self) -> AV[Tensor]:
        """x0 of the last call's unconditional pass, kept tokens not put back."""

    def blend(self, x: AV[Tensor]) -> AV[Tensor]:
        """``mask * x + (1 - mask) * clean`` in x's dtype."""
