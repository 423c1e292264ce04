"""An encoded prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..av import AV


@dataclass(frozen=True)
class Context:
    """What the transformer reads of a prompt: [1, S, width] for video and for audio, on the CPU."""

    features: AV[Tensor] = field(repr=False)

    @property
    def widths(self) -> tuple[int, int]:
        return self.features.video.shape[-1], self.features.audio.shape[-1]
