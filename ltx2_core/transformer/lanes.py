"""Where the two streams of a block compute: one after the other, or each in a lane of the device of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..av import AV


class Lanes:
    """Both streams in one lane, in the order video, audio.

    A block calls ``map`` for what each stream does by itself and ``meet`` where one reads what the other has made. Between
    two meetings neither lane may read, or give back, memory of the other.
    """

    def map(self, fn: Callable[..., Any], own: AV[Any], *others: AV[Any]) -> AV[Any]:
        """``AV.map``, each stream in its lane."""
        return own.map(fn, *others)

    def meet(self) -> None:
        """Each lane waits for the other."""

    def part(self) -> None:
        """Begin the second lane behind what the first has done so far."""

    def join(self) -> None:
        """End the second lane: the first goes on when both are done."""


ONE_LANE = Lanes()


class TwoLanes(Lanes):
    """Sound beside the picture: its matrices are so small that they fit into the gaps which large ones leave.

    The video's lane is the current CUDA stream; ``sound`` is the other one. For captured graphs, where changing streams and
    waiting cost the host nothing at replay.
    """

    def __init__(self, sound: torch.cuda.Stream):
        self._sound = sound

    def map(self, fn: Callable[..., Any], own: AV[Any], *others: AV[Any]) -> AV[Any]:
        video = AV(own.video, None).map(fn, *others)
        with torch.cuda.stream(self._sound):
            audio = AV(None, own.audio).map(fn, *others)
        return AV(video.video, audio.audio)

    def meet(self) -> None:
        picture = torch.cuda.current_stream(self._sound.device)
        ours, theirs = picture.record_event(), self._sound.record_event()
        picture.wait_event(theirs)
        self._sound.wait_event(ours)

    def part(self) -> None:
        self._sound.wait_stream(torch.cuda.current_stream(self._sound.device))

    def join(self) -> None:
        torch.cuda.current_stream(self._sound.device).wait_stream(self._sound)
