"""Pixel, latent and token shapes of both streams, the legal sizes, and what to say about illegal ones.

Grid rules and audio lengths: ltx-core 1.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

VIDEO_TIME_FACTOR = 8
VIDEO_SPACE_FACTOR = 32
AUDIO_LATENTS_PER_SECOND = 25.0  # 16000 Hz / 160 samples a mel frame / 4 mel frames a latent

MAX_SIDE = 8192
MAX_FRAMES = 8193
MAX_VIDEO_TOKENS = 1 << 20
MAX_FPS = 240.0


class ShapeError(ValueError):
    """A size that the model cannot make; the message names the nearest sizes that it can."""


@dataclass(frozen=True, slots=True)
class ClipShape:
    """What the user asks for.

    frames: pixel frames, 8k + 1. height, width: pixels, multiples of 32. fps: frames per second.
    """

    frames: int
    height: int
    width: int
    fps: float

    def __post_init__(self):
        check_fps(self.fps)
        check_side("height", self.height)
        check_side("width", self.width)
        check_frames(self.frames)
        tokens = self.latent_frames * self.latent_height * self.latent_width
        if tokens > MAX_VIDEO_TOKENS:
            longest = (MAX_VIDEO_TOKENS // (self.latent_height * self.latent_width) - 1) * VIDEO_TIME_FACTOR + 1
            raise ShapeError(
                f"{self.width}x{self.height} with {self.frames} frames makes {tokens:,} tokens; at most "
                f"{MAX_VIDEO_TOKENS:,} fit. At this size, use {longest} frames or fewer."
            )

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // VIDEO_TIME_FACTOR + 1

    @property
    def latent_height(self) -> int:
        return self.height // VIDEO_SPACE_FACTOR

    @property
    def latent_width(self) -> int:
        return self.width // VIDEO_SPACE_FACTOR

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of the video."""
        return self.latent_frames, self.latent_height, self.latent_width

    @property
    def num_video_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def duration_s(self) -> float:
        return self.frames / self.fps

    @property
    def audio_latents(self) -> int:
        """Audio latent frames that go with the clip: round(25 * seconds), at least 1.

        Python's round, as in the reference; a clip so short that it rounds to 0 still gets one.
        """
        return max(1, round(self.frames / self.fps * AUDIO_LATENTS_PER_SECOND))


def check_fps(fps: float) -> None:
    """Raise ShapeError unless 1 <= fps <= 240."""
    if not math.isfinite(fps) or not 1 <= fps <= MAX_FPS:
        raise ShapeError(f"{fps} frames per second cannot be used: choose 1 to {MAX_FPS:g}; the model knows 24 to 60.")


def check_side(name: str, pixels: int) -> None:
    """Raise ShapeError unless a side is a multiple of 32 between 32 and 8192."""
    if not 1 <= pixels <= MAX_SIDE:
        raise ShapeError(f"{name} {pixels} is out of range: choose {VIDEO_SPACE_FACTOR} to {MAX_SIDE} pixels.")
    if pixels % VIDEO_SPACE_FACTOR:
        below, above = _around(pixels, VIDEO_SPACE_FACTOR, 0)
        raise ShapeError(
            f"{name} {pixels} is not a multiple of {VIDEO_SPACE_FACTOR}. Nearest: {_choices(below, above, MAX_SIDE)}."
        )


def check_frames(frames: int) -> None:
    """Raise ShapeError unless frames = 8k + 1, up to 8193."""
    if not 1 <= frames <= MAX_FRAMES:
        raise ShapeError(f"{frames} frames are out of range: choose 1 to {MAX_FRAMES}.")
    if (frames - 1) % VIDEO_TIME_FACTOR:
        below, above = _around(frames, VIDEO_TIME_FACTOR, 1)
        raise ShapeError(
            f"{frames} frames do not fit the model, which makes 8k + 1. Nearest: {_choices(below, above, MAX_FRAMES)}."
        )


def frames_for_seconds(seconds: float, fps: float, min_frames: int = 1, max_frames: int = 1017) -> int:
    """The frame count 8k + 1 at or below ``seconds * fps``, and not below ``min_frames`` (ltx-core 1.2).

    Raises ShapeError for a duration that is not a positive number or longer than ``max_frames``.
    """
    check_fps(fps)
    if not math.isfinite(seconds) or seconds <= 0 or round(seconds * fps) > max_frames:
        raise ShapeError(
            f"{seconds} seconds at {fps:g} frames per second cannot be made: choose more than 0 and at most "
            f"{max_frames / fps:.1f} seconds."
        )
    raw = min(max(round(seconds * fps), min_frames), max_frames)
    down = (raw - 1) // VIDEO_TIME_FACTOR * VIDEO_TIME_FACTOR + 1
    if down >= min_frames:
        return down
    return min(math.ceil((min_frames - 1) / VIDEO_TIME_FACTOR) * VIDEO_TIME_FACTOR + 1, max_frames)


def _around(value: int, step: int, offset: int) -> tuple[int, int]:
    below = (value - offset) // step * step + offset
    return below, below + step


def _choices(below: int, above: int, limit: int) -> str:
    legal = [str(v) for v in (below, above) if 0 < v <= limit]
    return " or ".join(legal)
