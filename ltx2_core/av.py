"""The pair that runs through the whole engine: a video thing and an audio thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class AV(Generic[T]):
    """A video value and an audio value that travel together. Either may be absent (``None``).

    The fields are typed as present: most pairs are complete, and where one may lack a part ``map`` skips it.
    """

    video: T = None  # type: ignore[assignment]
    audio: T = None  # type: ignore[assignment]

    def map(self, fn: Callable[..., Any], *others: AV[Any]) -> AV[Any]:
        """Apply ``fn`` to the video parts and to the audio parts; a part that is absent here stays absent."""
        rows = zip((self.video, self.audio), *((o.video, o.audio) for o in others), strict=True)
        return AV(*(None if row[0] is None else fn(*row) for row in rows))

    def swap(self) -> AV[T]:
        """Each stream's counterpart: what the video is paired with, and what the audio is paired with."""
        return AV(self.audio, self.video)

    def present(self) -> Iterator[T]:
        """The parts that are there, video first."""
        return (part for part in (self.video, self.audio) if part is not None)
