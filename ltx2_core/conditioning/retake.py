"""Retake: a span of a clip is made again, in picture, sound or both."""

from __future__ import annotations

from torch import Tensor

from .audio import KeepAudio, RetakeAudio, Sound
from .condition import Condition
from .masks import KeepVideo, RetakeVideo


def retake(
    frames: Tensor, sound: Sound | None, start: float, end: float, *, video: bool = True, audio: bool = True
) -> tuple[Condition, ...]:
    """Conditions that make the span from ``start`` to ``end`` seconds of a clip again.

    frames: [N, H, W, 3] in 0..1. sound: the clip's; without one, sound is made from scratch for the whole clip.
    video, audio: what is made again; the other is held as it is.
    Raises ValueError when nothing is to be made again, or a sound is to be kept that is not there.
    """
    if not (video or audio):
        raise ValueError("a retake makes video, sound or both again: choose at least one")
    if sound is None and not audio:
        raise ValueError("there is no sound to keep: connect the clip's sound, or make it again too")
    picture: Condition = RetakeVideo(frames, start, end) if video else KeepVideo(frames)
    if sound is None:
        return (picture,)
    return picture, (RetakeAudio(sound, start, end, pad=True) if audio else KeepAudio(sound, pad=True))
