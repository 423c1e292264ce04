"""How strongly a LoRA counts, in each of the two streams."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

MAX_STRENGTH = 10.0


@dataclass(frozen=True)
class Strength:
    """Factors of a LoRA's changes in the video and in the audio stream; 1 is what the file was trained for."""

    video: float
    audio: float

    @classmethod
    def both(cls, strength: float) -> Strength:
        return cls(strength, strength)

    def of(self, layer: str) -> float:
        """The strength of a layer or parameter of our transformer: that of the stream which it writes to.

        Our names say the stream first, or first after the block's number: "blocks.3.video.cross_attn.to_k" reads
        audio tokens and writes to video.
        """
        parts = layer.split(".")
        stream = parts[2] if parts[0] == "blocks" and len(parts) > 2 else parts[0]
        return self.audio if stream == "audio" else self.video

    def __str__(self) -> str:
        return f"{self.video:g}" if self.video == self.audio else f"{self.video:g} (audio {self.audio:g})"


def check_strength(path: Path, strength: float) -> float:
    """The strength of a LoRA. Raises ValueError unless it is a number from -10 to 10."""
    if not (math.isfinite(strength) and abs(strength) <= MAX_STRENGTH):
        raise ValueError(
            f"{path}: a LoRA's strength must be a number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}, found {strength}. "
            "1 is what the file was trained for."
        )
    return float(strength)
