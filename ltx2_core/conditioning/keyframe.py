"""Keyframes: pictures that the clip passes through, as tokens beside its own, and keyframes that it makes itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..av import AV
from ..shapes import VIDEO_TIME_FACTOR, ClipShape
from .checks import check_pictures, check_share
from .condition import NOTHING, Encoders
from .image import ImageCondition, check_crf, image_crf
from .pixels import clip_pixels
from .state import LatentState, patchify_video, pixel_bounds


@dataclass(frozen=True)
class KeyframeCondition:
    """Lead the clip through an image, or a piece of a clip, at a pixel frame.

    image: [H, W, 3] in 0..1, or [N, H, W, 3] with N = 8k + 1 frames.
    frame: the pixel frame where it stands; negative counts from the end, -1 is the last.
    strength: 1 holds the model to the image, 0 ignores it.
    crf: H.264 re-compression of a single image (0 = none, ``None`` = the model version's default).
    """

    stream: ClassVar[str] = "video"
    image: Tensor = field(repr=False)
    frame: int
    strength: float = 1.0
    crf: int | None = None

    @property
    def label(self) -> str:
        return f"the keyframe at frame {self.frame}"

    @property
    def frames(self) -> Tensor:
        """The pictures, [N, H, W, 3]."""
        return self.image if self.image.ndim == 4 else self.image[None]

    def check(self, clip: ClipShape) -> None:
        check_pictures(self.label, self.image)
        check_share(f"the strength of {self.label}", self.strength)
        check_crf(self.image, self.crf)
        count = len(self.frames)
        if not -clip.frames <= self.frame < clip.frames:
            raise ValueError(
                f"{self.label} is outside the clip, which has frames 0 to {clip.frames - 1} (-1 is the last, "
                f"{-clip.frames} the first)"
            )
        if self._start(clip) + count > clip.frames:
            raise ValueError(
                f"{self.label} has {count} frames and would end behind the clip's last, {clip.frames - 1}: start at "
                f"{clip.frames - count} or before, or use fewer frames"
            )

    def writes(self, clip: ClipShape) -> range:
        return NOTHING

    def grid(self, clip: ClipShape) -> tuple[int, int, int]:
        """Latent frames, rows and columns of the added tokens."""
        return (len(self.frames) - 1) // VIDEO_TIME_FACTOR + 1, clip.latent_height, clip.latent_width

    def selected(self, clip: ClipShape) -> list[int]:
        """Which of the frames are encoded."""
        return list(range(len(self.frames)))

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        crf = image_crf(self.image, self.crf, encoders.default_crf)
        latents = encoders.video(clip_pixels(self.image, clip.height, clip.width, crf))
        positions = keyframe_positions(self.grid(clip), self._start(clip), len(self.frames), clip.fps)
        return replace(states, video=states.video.append(patchify_video(latents), positions, self.strength))

    def _start(self, clip: ClipShape) -> int:
        return self.frame % clip.frames


def first_last(
    first: Tensor, last: Tensor, first_strength: float = 1.0, last_strength: float = 1.0, crf: int | None = None
) -> tuple[ImageCondition, KeyframeCondition]:
    """Conditions that start a clip with one image [H, W, 3] and end it with another."""
    return ImageCondition(first, first_strength, crf), KeyframeCondition(last, -1, last_strength, crf)


def keyframe_positions(grid: tuple[int, int, int], start: int, num_pixel_frames: int, fps: float) -> Tensor:
    """Bounds [1, 3, T, 2] of a keyframe's tokens from pixel frame ``start`` on (ltx-core 1.2).

    A single frame lasts one pixel frame. A longer piece starts like a clip only where the clip starts.
    """
    bounds = pixel_bounds(grid, starts_clip=start == 0)
    bounds[0] += start
    if num_pixel_frames == 1:
        bounds[0, :, 1] = bounds[0, :, 0] + 1
    bounds[0] /= fps
    return bounds[None]


@dataclass(frozen=True)
class GeneratedKeyframes:
    """Let the model make keyframes of its own beside the clip (LTX-2.5; ltx-core 1.2).

    frames: pixel frames where they stand, rising. initial: normalised latents [1, C, K, H', W'] that they start from.
    The transformer must have an embedding for keyframes; whoever samples checks that.
    """

    stream: ClassVar[str] = "video"
    label: ClassVar[str] = "the generated keyframes"
    frames: tuple[int, ...]
    initial: Tensor | None = field(default=None, repr=False)

    def check(self, clip: ClipShape) -> None:
        if not self.frames or any(a >= b for a, b in zip(self.frames, self.frames[1:], strict=False)):
            raise ValueError(f"{self.label} stand at {list(self.frames)}: give frames that rise from one to the next")
        if self.frames[0] < 0 or self.frames[-1] >= clip.frames:
            raise ValueError(
                f"{self.label} at {list(self.frames)} are not all inside the clip, which has frames 0 to {clip.frames - 1}"
            )
        needed = (len(self.frames), clip.latent_height, clip.latent_width)
        if self.initial is not None and (self.initial.ndim != 5 or tuple(self.initial.shape[2:]) != needed):
            raise ValueError(
                f"{self.label} start from latents {list(self.initial.shape)}; needed are [batch, channels, "
                f"{', '.join(map(str, needed))}]"
            )

    def writes(self, clip: ClipShape) -> range:
        return NOTHING

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        state = states.video
        rows = pixel_bounds((len(self.frames), clip.latent_height, clip.latent_width))
        starts = torch.tensor(self.frames, dtype=torch.float32).repeat_interleave(
            clip.latent_height * clip.latent_width
        )
        rows[0] = torch.stack((starts, starts + 1), -1) / clip.fps
        if self.initial is None:
            tokens = state.latent.new_zeros(1, rows.shape[1], state.latent.shape[2])
        else:
            tokens = patchify_video(self.initial)
        return replace(states, video=state.append_slots(tokens, rows[None]))


def generated_keyframes(state: LatentState, x: Tensor, clip: ClipShape) -> Tensor:
    """The generated keyframes in tokens [B, T, C], as latents [B, C, K, H', W'], each a clip of one frame."""
    tokens = x[:, state.slots.start : state.slots.stop]
    return tokens.transpose(1, 2).unflatten(2, (-1, clip.latent_height, clip.latent_width)).contiguous()


def evenly_spaced(count: int, frames: int) -> tuple[int, ...]:
    """Pixel frames that divide a clip evenly, without its ends.

    Raises ValueError when the clip is shorter than ``count + 2`` frames.
    """
    if count < 1 or frames < count + 2:
        raise ValueError(f"{count} keyframes do not fit inside {frames} frames: use 1 to {frames - 2}")
    # float64 and Python's round: half to even
    return tuple(round(index * (frames - 1) / (count + 1)) for index in range(1, count + 1))
