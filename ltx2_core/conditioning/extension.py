"""A clip that goes on from another one, or leads up to it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..av import AV
from ..shapes import AUDIO_LATENTS_PER_SECOND, VIDEO_TIME_FACTOR, ClipShape
from .audio import Sound, check_length
from .checks import check_count, check_pictures, check_share
from .condition import Condition, Encoders
from .masks import source_tokens
from .state import LatentState

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class ExtendVideo:
    """Make what follows a clip (forward), or what leads up to it (backward).

    frames: the clip that is there, [8k + 1, H, W, 3] in 0..1. Forward keeps all of them as the start; backward keeps the
    last 8k as the end, and the first only tells the encoder what came before (latents of a clip's start differ from
    those of its middle).
    strength: 1 keeps the frames exactly.
    """

    stream: ClassVar[str] = "video"
    frames: Tensor = field(repr=False)
    direction: str = "forward"
    strength: float = 1.0

    @property
    def label(self) -> str:
        return f"the {self.direction} extension"

    def check(self, clip: ClipShape) -> None:
        check_direction(self.direction)
        if self.frames.ndim != 4:
            raise ValueError(f"the clip to extend must be [frames, height, width, 3], found {list(self.frames.shape)}")
        check_pictures("the clip to extend", self.frames)
        check_share(f"the strength of {self.label}", self.strength)
        check_extension(len(self.frames), self.direction, clip)

    def writes(self, clip: ClipShape) -> range:
        return latent_span(len(self.frames), self.direction, clip)

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        span, cells = self.writes(clip), clip.latent_height * clip.latent_width
        tokens = source_tokens(self.frames, clip, encoders)[:, -len(span) * cells :]
        return replace(states, video=states.video.write(tokens, span.start * cells, self.strength))


@dataclass(frozen=True)
class ExtendAudio:
    """Keep the sound of the clip that is extended.

    frames: how many frames the extended clip has, 8k + 1: its sound is kept for as long as they last.
    """

    stream: ClassVar[str] = "audio"
    sound: Sound
    frames: int
    direction: str = "forward"

    @property
    def label(self) -> str:
        return f"the {self.direction} extension of the sound"

    def check(self, clip: ClipShape) -> None:
        check_direction(self.direction)
        check_count("the clip to extend", self.frames)
        check_extension(self.frames, self.direction, clip)
        self.sound.check("the sound to extend")
        check_length("the sound to extend", self.sound.duration_s, self.frames / clip.fps, pad=False)
        if not self.writes(clip):
            raise ValueError(f"the sound to extend is too short to keep: {self.frames / clip.fps:.3f} s")

    def writes(self, clip: ClipShape) -> range:
        if self.direction == "forward":
            return range(_latents(self.frames, clip))
        return range(clip.audio_latents - _latents(self.frames - 1, clip), clip.audio_latents)

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        span, whole = self.writes(clip), _latents(self.frames, clip)
        tokens = self.sound.part(0.0, self.frames / clip.fps).tokens(whole, encoders)
        return replace(states, audio=states.audio.write(tokens[:, -len(span) :], span.start, 1.0))


def extension(frames: Tensor, sound: Sound | None, direction: str) -> tuple[Condition, ...]:
    """Conditions that extend a clip [8k + 1, H, W, 3] and, where it has one, its sound."""
    video = ExtendVideo(frames, direction)
    return (video,) if sound is None else (video, ExtendAudio(sound, len(frames), direction))


def latent_span(frames: int, direction: str, clip: ClipShape) -> range:
    """The latent frames that 8k + 1 frames keep: k + 1 at the start, or k at the end."""
    count = (frames - 1) // VIDEO_TIME_FACTOR
    return range(count + 1) if direction == "forward" else range(clip.latent_frames - count, clip.latent_frames)


def check_direction(direction: str) -> None:
    """Refuse an unknown direction."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; choose {' or '.join(DIRECTIONS)}")


def check_extension(frames: int, direction: str, clip: ClipShape) -> None:
    """Refuse an extension that keeps nothing, or leaves nothing to make."""
    kept = len(latent_span(frames, direction, clip))
    if kept == 0:
        raise ValueError(f"a backward extension needs 9 frames or more of the clip that follows, found {frames}")
    if kept >= clip.latent_frames:
        raise ValueError(
            f"the clip to extend has {frames} frames, the whole clip {clip.frames}: nothing would be left to make. Use "
            f"more than {frames} frames for the whole clip."
        )


def _latents(frames: int, clip: ClipShape) -> int:
    return round(frames / clip.fps * AUDIO_LATENTS_PER_SECOND)
