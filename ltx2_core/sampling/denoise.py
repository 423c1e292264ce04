"""From noisy tokens to the guided, masked estimate of the clean ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from ...kernels import wide
from ..av import AV
from ..conditioning.state import LatentState
from .guidance import GuidancePass, StreamGuidance, combine

# (noisy tokens [B, T, C] of each stream, sigma, which streams are updated) -> the velocity of every pass
Evaluate = Callable[[AV[Tensor], float, AV[bool]], Sequence[AV[Tensor]]]


class Denoiser:
    """Estimates x0: all passes, x0 from each velocity, guidance, kept tokens put back. One object a run.

    Order and rounding of ltx-core 1.2: x0 and guidance in float32, each rounded to the tokens' dtype.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        states: AV[LatentState],
        passes: Sequence[GuidancePass],
        guidance: AV[StreamGuidance],
        on_evaluated: Callable[[AV[Tensor]], None] = lambda _: None,
    ):
        """on_evaluated: called with every estimate, for progress and preview; may raise to stop."""
        self._on_evaluated = on_evaluated
        self._evaluate = evaluate
        self._states = states
        self._passes = passes
        self._guidance = guidance
        self._guided: AV[Tensor] = AV()
        self._uncond: AV[Tensor] = AV()

    def __call__(self, x: AV[Tensor], sigma: float, *, step: int, midpoint: bool = False) -> AV[Tensor]:
        """The guided x0 of noisy tokens at ``sigma``, kept tokens blended in.

        A modality whose guidance skips this step keeps its last result; midpoints are never skipped.
        """
        enabled = x.map(lambda _, guidance: midpoint or not guidance.skips(step), self._guidance)
        if any(enabled.present()):
            self._guided = self._estimate(x, sigma, enabled)
        x0 = self.blend(self._guided)
        self._on_evaluated(x0)
        return x0

    def _estimate(self, x: AV[Tensor], sigma: float, enabled: AV[bool]) -> AV[Tensor]:
        velocities = self._evaluate(x, sigma, enabled)
        predictions = [self._x0(x, velocity, sigma) for velocity in velocities]
        names = [one.name for one in self._passes]
        if "uncond" in names:
            self._uncond = predictions[names.index("uncond")]

        def guided(_: Tensor, on: bool, guidance: StreamGuidance, last: Tensor | None, *passes: Tensor) -> Tensor:
            return combine(dict(zip(names, passes, strict=True)), guidance) if on or last is None else last

        return x.map(guided, enabled, self._guidance, self._guided, *predictions)

    def unguided(self) -> AV[Tensor]:
        """x0 of the negative prompt at the last call, without kept tokens (CFG++)."""
        assert self._uncond.video is not None or self._uncond.audio is not None, "no pass of the negative prompt ran"
        return self._uncond

    def blend(self, x: AV[Tensor]) -> AV[Tensor]:
        """Kept tokens put back: m x + (1 - m) clean, computed in float32 or wider, in x's dtype."""
        return x.map(_blend, self._states)

    def _x0(self, x: AV[Tensor], velocity: AV[Tensor], sigma: float) -> AV[Tensor]:
        return x.map(partial(_x0, sigma=sigma), velocity, self._states)


def _x0(x: Tensor, velocity: Tensor, state: LatentState, *, sigma: float) -> Tensor:
    # the token's own level, not the scalar one: a half-kept token carries half the noise
    return (wide(x) - wide(velocity) * (state.mask * sigma)).to(x.dtype)


def _blend(x: Tensor, state: LatentState) -> Tensor:
    return (wide(x) * state.mask + wide(state.clean) * (1 - state.mask)).to(x.dtype)
