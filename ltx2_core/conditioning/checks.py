"""Checks that several kinds of conditioning share; each raises ValueError with what was found and what works."""

from __future__ import annotations

import math

from torch import Tensor

from ..shapes import VIDEO_TIME_FACTOR, ClipShape


def check_share(name: str, value: float) -> None:
    """Refuse a strength or weight outside 0..1."""
    if not math.isfinite(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value:g}; it must lie between 0 and 1")


def check_pictures(name: str, pictures: Tensor) -> None:
    """Refuse anything but one picture [H, W, 3] or a clip [N, H, W, 3] of 8k + 1 of them."""
    if pictures.ndim not in (3, 4) or pictures.shape[-1] != 3 or 0 in pictures.shape:
        raise ValueError(
            f"{name} must be [height, width, 3] or [frames, height, width, 3], found {list(pictures.shape)}"
        )
    if pictures.ndim == 4:
        check_count(name, pictures.shape[0])


def check_count(name: str, frames: int) -> None:
    """Refuse a number of frames that the video encoder does not take."""
    if (frames - 1) % VIDEO_TIME_FACTOR:
        below = (frames - 1) // VIDEO_TIME_FACTOR * VIDEO_TIME_FACTOR + 1
        raise ValueError(
            f"{name} has {frames} frames; the model encodes 8k + 1. Nearest: {below} or {below + VIDEO_TIME_FACTOR}."
        )


def check_source(name: str, frames: Tensor, clip: ClipShape) -> None:
    """Refuse a source clip that has not as many frames as the clip that is made from it."""
    check_pictures(name, frames)
    if frames.ndim != 4 or frames.shape[0] != clip.frames:
        found = frames.shape[0] if frames.ndim == 4 else 1
        raise ValueError(
            f"{name} has {found} frames, the clip {clip.frames}: they must be equal. Make the clip {found} frames long, "
            "or cut the source."
        )


def check_span(name: str, start: float, end: float, clip: ClipShape) -> None:
    """Refuse a span of seconds that is empty or not inside the clip."""
    if not (math.isfinite(start) and math.isfinite(end)) or start >= end:
        raise ValueError(f"{name} starts at {start:g} s and ends at {end:g} s: the end must come after the start")
    if start < 0 or end > clip.duration_s + 1e-3:
        raise ValueError(
            f"{name} {start:g} to {end:g} s is not inside the clip, which lasts from 0 to {clip.duration_s:.3f} s"
        )
