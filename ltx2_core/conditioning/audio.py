"""Sound that a clip is made from: held as it is, made again in part, or a voice to follow."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..av import AV
from ..shapes import AUDIO_LATENTS_PER_SECOND, ClipShape
from .checks import check_share, check_span
from .condition import NOTHING, Encoders
from .masks import region_mask
from .state import LatentState, audio_positions, patchify_audio

# a sound decoded from LTX-2 ends up to 0.05 s before its video; that much silence is not worth a question
_SLACK_S = 2 / AUDIO_LATENTS_PER_SECOND
_SHORTEST_S = 1 / AUDIO_LATENTS_PER_SECOND
_LONGEST_REFERENCE_S = 300.0
_GAP_S = 0.04
_RATES_HZ = (1_000, 768_000)


@dataclass(frozen=True)
class Sound:
    """A waveform [channels, N] in [-1, 1]; mono plays on both sides, of more than two channels the first two count."""

    waveform: Tensor = field(repr=False)
    sample_rate: int

    @property
    def duration_s(self) -> float:
        return self.waveform.shape[-1] / self.sample_rate

    def check(self, name: str) -> None:
        """Raise ValueError for what is no sound or too short to encode."""
        if self.waveform.ndim != 2 or self.waveform.shape[0] == 0:
            raise ValueError(f"{name} must be [channels, samples], found {list(self.waveform.shape)}")
        low, high = _RATES_HZ
        if not low <= self.sample_rate <= high:
            raise ValueError(f"{name} has a sample rate of {self.sample_rate} Hz; {low} to {high} Hz can be used")
        if self.duration_s < _SHORTEST_S:
            raise ValueError(
                f"{name} is too short: {self.waveform.shape[-1]} samples at {self.sample_rate} Hz last "
                f"{self.duration_s:.3f} s, at least {_SHORTEST_S:g} s are needed"
            )

    def part(self, start: float, seconds: float) -> Sound:
        """What sounds from ``start`` on for at most ``seconds``."""
        first = round(start * self.sample_rate)
        return replace(self, waveform=self.waveform[:, first : first + round(seconds * self.sample_rate)])

    def tokens(self, count: int | None, encoders: Encoders) -> Tensor:
        """Tokens [1, count, C]; silence, as zeros in normalised latents, fills what the sound lacks."""
        latents = encoders.audio(self.waveform[None], self.sample_rate)
        if count is not None:
            # a negative pad crops
            latents = F.pad(latents, (0, 0, 0, count - latents.shape[2]))
        return patchify_audio(latents)


@dataclass(frozen=True)
class KeepAudio:
    """Hold a sound as it is while video is made for it. The clip's own sound is the sound itself, not its decoded latents.

    start: seconds into the sound where the clip starts; what sounds after the clip is left out.
    pad: fill what the sound lacks at the end with silence, instead of refusing it.
    """

    stream: ClassVar[str] = "audio"
    label: ClassVar[str] = "the sound that is kept"
    sound: Sound
    start: float = 0.0
    pad: bool = False

    def check(self, clip: ClipShape) -> None:
        self.sound.check(self.label)
        if not 0 <= self.start <= self.sound.duration_s - _SHORTEST_S:
            raise ValueError(
                f"{self.label} is to start at {self.start:g} s, but lasts from 0 to {self.sound.duration_s:.2f} s"
            )
        check_length(self.label, self.sound.duration_s - self.start, clip.duration_s, pad=self.pad)

    def writes(self, clip: ClipShape) -> range:
        return range(clip.audio_latents)

    def heard(self, clip: ClipShape) -> Sound:
        """The part of the sound that goes with the clip."""
        return self.sound.part(self.start, clip.duration_s)

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        tokens = self.heard(clip).tokens(states.audio.num_target, encoders)
        return replace(states, audio=states.audio.freeze(tokens))


@dataclass(frozen=True)
class RetakeAudio:
    """Make a span of a sound again and keep the rest.

    start, end: the span, in seconds. Every latent frame (0.04 s) that it touches is made again.
    pad: fill what the sound lacks at the end with silence, instead of refusing it.
    """

    stream: ClassVar[str] = "audio"
    label: ClassVar[str] = "the retake of the sound"
    sound: Sound
    start: float
    end: float
    pad: bool = False

    def check(self, clip: ClipShape) -> None:
        self.sound.check("the source sound")
        check_length("the source sound", self.sound.duration_s, clip.duration_s, pad=self.pad)
        check_span("the span to retake", self.start, self.end, clip)
        if not bool(region_mask(audio_positions(clip.audio_latents), self.start, self.end).any()):
            raise ValueError(
                f"the span to retake, {self.start:g} to {self.end:g} s, lies behind the sound's last latent"
            )

    def writes(self, clip: ClipShape) -> range:
        return range(clip.audio_latents)

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        count = states.audio.num_target
        tokens = self.sound.part(0.0, clip.duration_s).tokens(count, encoders)
        span = region_mask(audio_positions(count), self.start, self.end)
        return replace(states, audio=states.audio.start_from(tokens, span))


@dataclass(frozen=True)
class ReferenceAudio:
    """Let the clip's sound follow a voice that is heard, for the model, just before it starts.

    strength: 1 gives the sound as it is, 0 noise.
    """

    stream: ClassVar[str] = "audio"
    label: ClassVar[str] = "the reference sound"
    sound: Sound
    strength: float = 1.0

    def check(self, clip: ClipShape) -> None:
        self.sound.check(self.label)
        check_share(f"the strength of {self.label}", self.strength)
        if self.sound.duration_s > _LONGEST_REFERENCE_S:
            raise ValueError(
                f"{self.label} lasts {self.sound.duration_s:.0f} s; use at most {_LONGEST_REFERENCE_S:.0f} s"
            )

    def writes(self, clip: ClipShape) -> range:
        return NOTHING

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        tokens = self.sound.tokens(None, encoders)
        positions = reference_audio_positions(tokens.shape[1])
        return replace(states, audio=states.audio.append(tokens, positions, self.strength))


def reference_audio_positions(count: int) -> Tensor:
    """Bounds [1, 1, T, 2] in seconds of a sound that ends one latent before the clip starts (ltx-pipelines 1.2)."""
    positions = audio_positions(count)
    return positions - (positions[..., -1:, 1:] + torch.tensor(_GAP_S))


def check_length(name: str, found_s: float, needed_s: float, *, pad: bool) -> None:
    """Refuse a sound that ends before the clip does, unless silence may fill the rest."""
    if not pad and found_s < needed_s - _SLACK_S:
        raise ValueError(
            f"{name} lasts {found_s:.2f} s, the clip {needed_s:.2f} s: use a longer sound or a shorter clip, or allow "
            "silence at its end"
        )
