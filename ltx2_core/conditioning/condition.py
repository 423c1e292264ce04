"""What a kind of conditioning is, what it may ask for, and which of them exclude each other."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Protocol

from torch import Tensor

from ..av import AV
from ..shapes import ClipShape
from .state import LatentState


class Encoders(Protocol):
    """The encoders of a model; networks are read when first used.

    default_crf: H.264 re-compression of images that the model was trained with.
    """

    @property
    def default_crf(self) -> int: ...

    def video(self, pixels: Tensor) -> Tensor:
        """[1, 3, F, H, W] in [-1, 1] -> normalised latents [1, C, F', H', W'] on the device, in the states' dtype."""
        ...

    def audio(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """[1, channels, N] in [-1, 1] -> normalised latents [1, C, T, M] on the device, in the states' dtype."""
        ...


class Condition(Protocol):
    """One thing that a clip is made from or held to. It touches one stream, ``video`` or ``audio``.

    label: how messages name it.
    """

    @property
    def stream(self) -> str: ...

    @property
    def label(self) -> str: ...

    def check(self, clip: ClipShape) -> None:
        """Raise ValueError when it does not fit the clip; called before anything is loaded."""
        ...

    def writes(self, clip: ClipShape) -> range:
        """The stream's latent frames whose content it decides; empty for what only adds tokens."""
        ...

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        """The states with this condition in them. The target's tokens stay first and keep their number."""
        ...


NOTHING = range(0)


def check_conditions(conditions: Iterable[Condition], clip: ClipShape, streams: AV[bool]) -> None:
    """Check every condition by itself and each pair against the other.

    Raises ValueError when one does not fit the clip, needs a stream that is not made, or two decide the same frames.
    """
    conditions = tuple(conditions)
    for one in conditions:
        if not getattr(streams, one.stream):
            missing = {"video": "video: it is sound only", "audio": "sound: it is video only"}[one.stream]
            raise ValueError(f"{one.label} cannot be used: the clip has no {missing}")
        one.check(clip)
    for one, other in combinations(conditions, 2):
        shared = set(one.writes(clip)) & set(other.writes(clip)) if one.stream == other.stream else ()
        if shared:
            raise ValueError(
                f"{one.label} and {other.label} both decide latent frames {min(shared)} to {max(shared)} of the "
                f"{one.stream}: remove one of them, or move it; a keyframe or reference only adds to what is there"
            )
