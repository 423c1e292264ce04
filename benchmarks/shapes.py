"""The clips that benchmarks run, from pixels to tokens, and what a forward of the transformer computes for them."""

from __future__ import annotations

from dataclasses import dataclass

import pack  # noqa: F401
from ltx2_engine.ltx2_core.shapes import ClipShape

FPS = 24.0
TEXT_TOKENS = 1024


@dataclass(frozen=True)
class Shape:
    """A clip at 24 frames per second. height, width: pixels."""

    height: int
    width: int
    frames: int = 121

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From ``HEIGHTxWIDTHxFRAMES``."""
        return cls(*map(int, text.split("x")))

    @property
    def clip(self) -> ClipShape:
        return ClipShape(self.frames, self.height, self.width, FPS)

    @property
    def video_tokens(self) -> int:
        return self.clip.num_video_tokens

    @property
    def audio_tokens(self) -> int:
        return self.clip.audio_latents

    @property
    def tflop(self) -> float:
        """10^12 operations of one forward of LTX-2.3 at full size: linear layers, attention, head gates, both ends."""
        video, audio, text = self.video_tokens, self.audio_tokens, TEXT_TOKENS
        linear = 2**29 * video + 150_994_944 * audio + 83_886_080 * text
        attention = 16384 * video**2 + 8192 * audio**2 + (16384 * video + 8192 * audio) * text + 16384 * video * audio
        gates = 192 * (4096 * video + 2048 * audio)
        ends = 2_097_152 * video + 1_048_576 * audio + 636e6
        return (48 * (linear + attention + gates) + ends) / 1e12


SMALL = Shape(512, 768)
STAGE_1 = Shape(544, 960)
MIDDLE = Shape(768, 1280)
LARGE = Shape(1088, 1920)
SHAPES = (SMALL, STAGE_1, MIDDLE, LARGE)
TINY = (Shape(64, 96, 9), Shape(64, 96, 17))
