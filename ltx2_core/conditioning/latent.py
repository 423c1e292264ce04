"""The latent that travels between nodes: a clip's shape, its content so far, and what it is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..av import AV
from ..shapes import ClipShape
from .condition import Condition, Encoders, check_conditions

if TYPE_CHECKING:
    from torch import Tensor

    from .state import LatentState

# the picture size counts for nothing where there is no picture
_SOUND_ONLY_SIDE = 512


@dataclass(frozen=True)
class AVLatent:
    """Latents of a clip, on the CPU.

    latents: video [B, C, F, H, W] and audio [B, C, T, M], normalised; an absent one starts from nothing.
    masks: share of each latent cell to generate, [B, 1, F, H, W] and [B, 1, T, 1]; absent = generate everything.
    conditions: applied in this order.
    streams: which streams there are; one that is not there is neither made nor read.
    """

    clip: ClipShape
    latents: AV[Tensor] = field(default_factory=AV, repr=False)
    masks: AV[Tensor] = field(default_factory=AV, repr=False)
    conditions: tuple[Condition, ...] = field(default=(), repr=False)
    streams: AV[bool] = field(default_factory=lambda: AV(True, True))

    @staticmethod
    def sound_only(frames: int, fps: float) -> AVLatent:
        """Sound without a picture, as long as ``frames`` (8k + 1) at ``fps`` last."""
        return AVLatent(ClipShape(frames, _SOUND_ONLY_SIDE, _SOUND_ONLY_SIDE, fps), streams=AV(False, True))

    @staticmethod
    def video_only(clip: ClipShape) -> AVLatent:
        """A picture without sound."""
        return AVLatent(clip, streams=AV(True, False))

    def with_condition(self, *conditions: Condition) -> AVLatent:
        return replace(self, conditions=(*self.conditions, *conditions))

    def with_audio_of(self, other: AVLatent) -> AVLatent:
        """This picture with the sound of another latent. Raises ValueError when they do not go together."""
        if other.latents.audio is None:
            raise ValueError("the latent to take the sound from has none: connect a sampler's output")
        found, needed = other.clip.audio_latents, self.clip.audio_latents
        if found != needed:
            raise ValueError(
                f"the sound lasts {other.clip.duration_s:.2f} s and the picture {self.clip.duration_s:.2f} s: they must be "
                "of the same length"
            )
        return replace(
            self,
            latents=AV(self.latents.video, other.latents.audio),
            masks=AV(self.masks.video),
            streams=AV(self.streams.video, True),
        )

    def without_video(self) -> AVLatent:
        """The sound alone."""
        streams = AV(False, self.streams.audio)
        return replace(self, latents=AV(audio=self.latents.audio), masks=AV(audio=self.masks.audio), streams=streams)

    def check_conditions(self) -> None:
        """Raise ValueError for a condition that does not fit the clip, its masks or another condition. Loads nothing."""
        check_conditions(self.conditions, self.clip, self.streams)
        sizes = AV(self.clip.latent_frames, self.clip.audio_latents)
        for one in self.conditions:
            masked = getattr(self.masks, one.stream) is not None
            if masked and len(one.writes(self.clip)) == getattr(sizes, one.stream):
                raise ValueError(
                    f"{one.label} decides what is kept of the whole {one.stream}, and so does the latent's noise mask: "
                    "remove one of them"
                )

    def conditioned(self, states: AV[LatentState], encoders: Encoders) -> AV[LatentState]:
        """The states with all conditions in them, in order."""
        for condition in self.conditions:
            states = condition.apply(states, self.clip, encoders)
        return states
