"""From noisy tokens to the guided, masked estimate of the clean ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...kernels import wide
from ..av import AV
from ..conditioning.state import LatentState
from .guidance import GuidancePass, StreamGuidance, combine

# (noisy tokens [B, T, C] of each stream, sigma) -> velocities of all passes, [passes * B, T, C], pass-major
Evaluate = Callable[[AV[Tensor], float], AV[Tensor]]


@dataclass(frozen=True)
class Denoiser:
    """Estimates x0: all passes in one evaluation, x0 from each velocity, guidance, kept tokens put back.

    Order and rounding of ltx-core 1.2: x0 and guidance in float32, each rounded to the tokens' dtype.
    """

    evaluate: Evaluate
    states: AV[LatentState]
    passes: tuple[GuidancePass, ...]
    guidance: AV[StreamGuidance]

    def __call__(self, x: AV[Tensor], sigma: float) -> AV[Tensor]:
        velocity = self.evaluate(x, sigma)
        return x.map(lambda x, v, state, g: self._stream(x, v, state, g, sigma), velocity, self.states, self.guidance)

    def _stream(
        self, x: Tensor, velocity: Tensor, state: LatentState, guidance: StreamGuidance, sigma: float
    ) -> Tensor:
        # the token's own level, not the scalar one: a half-kept token carries half the noise
        level = state.mask * sigma
        predictions = {
            one.name: (wide(x) - wide(v) * level).to(x.dtype)
            for one, v in zip(self.passes, velocity.chunk(len(self.passes)), strict=True)
        }
        x0 = combine(predictions, guidance)
        return (wide(x0) * state.mask + wide(state.clean) * (1 - state.mask)).to(x.dtype)
