"""Parts of a clip that are made again: a span of time, or a masked region; and a video that is held as it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..av import AV
from ..shapes import VIDEO_SPACE_FACTOR, VIDEO_TIME_FACTOR, ClipShape
from .checks import check_source, check_span
from .condition import Encoders
from .pixels import clip_pixels, visible_part
from .state import LatentState, patchify_video, video_positions


@dataclass(frozen=True)
class RetakeVideo:
    """Make a span of a video again and keep the rest.

    frames: the source, [N, H, W, 3] in 0..1 with as many frames as the clip.
    start, end: the span, in seconds. Every latent frame that it touches is made again.
    """

    stream: ClassVar[str] = "video"
    label: ClassVar[str] = "the retake of the video"
    frames: Tensor = field(repr=False)
    start: float
    end: float

    def check(self, clip: ClipShape) -> None:
        check_source("the source video", self.frames, clip)
        check_span("the span to retake", self.start, self.end, clip)

    def writes(self, clip: ClipShape) -> range:
        return range(clip.latent_frames)

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        span = region_mask(video_positions(clip.grid, clip.fps), self.start, self.end)
        return replace(states, video=states.video.start_from(source_tokens(self.frames, clip, encoders), span))


@dataclass(frozen=True)
class InpaintVideo:
    """Make a masked region of a video again and keep the rest.

    frames: the source, [N, H, W, 3] in 0..1 with as many frames as the clip.
    mask: [M, h, w] in 0..1 with the source's aspect ratio, one for all frames or one a frame; 1 = make again.
    A latent cell is made again when more than half of it is marked in any of the frames that it holds: frame 0, then
    8 at a time. (The trainer of LTX-2 groups frames 0..7, 8..15 ..., which is not how the encoder does.)
    """

    stream: ClassVar[str] = "video"
    label: ClassVar[str] = "the inpainting"
    frames: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)

    def check(self, clip: ClipShape) -> None:
        check_source("the source video", self.frames, clip)
        check_mask("the inpainting mask", self.mask, self.frames)
        if not bool(latent_region(self.mask, clip).any()):
            raise ValueError(
                "the inpainting mask marks nothing to make again: it must cover more than half of a cell of "
                f"{VIDEO_SPACE_FACTOR}x{VIDEO_SPACE_FACTOR} pixels somewhere in the clip"
            )

    def writes(self, clip: ClipShape) -> range:
        return range(clip.latent_frames)

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        region = latent_region(self.mask, clip).flatten()
        return replace(states, video=states.video.start_from(source_tokens(self.frames, clip, encoders), region))


@dataclass(frozen=True)
class KeepVideo:
    """Hold the whole video as it is while sound is made for it. frames: [N, H, W, 3] in 0..1, as many as the clip's."""

    stream: ClassVar[str] = "video"
    label: ClassVar[str] = "the video that is kept"
    frames: Tensor = field(repr=False)

    def check(self, clip: ClipShape) -> None:
        check_source(self.label, self.frames, clip)

    def writes(self, clip: ClipShape) -> range:
        return range(clip.latent_frames)

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        return replace(states, video=states.video.freeze(source_tokens(self.frames, clip, encoders)))


def check_mask(name: str, mask: Tensor, frames: Tensor) -> None:
    """Refuse a mask that does not lie over the frames [N, H, W, 3], or has values outside 0..1."""
    if mask.ndim != 3 or 0 in mask.shape:
        raise ValueError(f"{name} must be [frames, height, width], found {list(mask.shape)}")
    count, height, width = frames.shape[:3]
    if mask.shape[0] not in (1, count):
        raise ValueError(f"{name} has {mask.shape[0]} frames; it needs 1, or {count} as what it lies over")
    h, w = mask.shape[1:]
    # a pixel of rounding in either side, as scaling a mask by itself makes
    if abs(h * width - w * height) > max(height, width):
        raise ValueError(
            f"{name} is {w}x{h} and what it lies over {width}x{height}: it is resized to fit, but the aspect ratio must "
            "be the same"
        )
    low, high = float(mask.min()), float(mask.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} has values from {low:g} to {high:g}; they must lie between 0 and 1")


def latent_region(mask: Tensor, clip: ClipShape) -> Tensor:
    """Latent cells that a pixel mask [M, h, w] marks: [F, H, W] float32 of 0 and 1."""
    areas = F.interpolate(
        visible_part(mask, clip.height, clip.width).cpu().float()[None],
        size=(clip.latent_height, clip.latent_width),
        mode="area",
    )[0]
    if len(areas) == 1:
        areas = areas.expand(clip.latent_frames, -1, -1)
    elif len(areas) > 1:
        groups = areas[1:].unflatten(0, (-1, VIDEO_TIME_FACTOR)).amax(1)
        areas = torch.cat((areas[:1], groups))
    return (areas > 0.5).float()


def region_mask(positions: Tensor, start: float, end: float) -> Tensor:
    """1 for the tokens at ``positions`` [1, axes, T, 2] that a span of seconds touches, else 0: [T] float32."""
    begins, ends = positions[0, 0].unbind(-1)
    return ((ends > start) & (begins < end)).float()


def source_tokens(frames: Tensor, clip: ClipShape, encoders: Encoders) -> Tensor:
    """Tokens [1, T, C] of a source clip [N, H, W, 3], scaled to cover the clip's size."""
    return patchify_video(encoders.video(clip_pixels(frames, clip.height, clip.width)))
