"""A reference video beside the clip, as in-context LoRAs read it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..av import AV
from ..shapes import VIDEO_SPACE_FACTOR, VIDEO_TIME_FACTOR, ClipShape
from .checks import check_share
from .condition import NOTHING, Encoders
from .pixels import clip_pixels
from .state import LatentState, patchify_video, pixel_bounds


@dataclass(frozen=True)
class ReferenceVideo:
    """Show the model a video while it makes the clip; an in-context LoRA says what to do with it.

    frames: [N, H, W, 3] in 0..1; one picture is a video of one frame. What goes beyond the clip's length, or beyond
    8k + 1 frames, is left out.
    downscale: the reference is this much smaller than the clip in both directions (the LoRA's metadata say).
    temporal_scale: of frames after the first, every this many-th is used, from frame 1 on (the LoRA's metadata say).
    strength: 1 shows the reference as it is, 0 shows noise.
    """

    stream: ClassVar[str] = "video"
    label: ClassVar[str] = "the reference video"
    frames: Tensor = field(repr=False)
    downscale: int = 1
    temporal_scale: int = 1
    strength: float = 1.0

    def check(self, clip: ClipShape) -> None:
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or 0 in self.frames.shape:
            raise ValueError(f"{self.label} must be [frames, height, width, 3], found {list(self.frames.shape)}")
        check_share(f"the strength of {self.label}", self.strength)
        for name, factor in (("downscale", self.downscale), ("temporal scale", self.temporal_scale)):
            if factor < 1:
                raise ValueError(f"the {name} factor of {self.label} is {factor}; it must be 1 or more")
        step = VIDEO_SPACE_FACTOR * self.downscale
        for name, side in (("height", clip.height), ("width", clip.width)):
            if side % step:
                below = side // step * step
                raise ValueError(
                    f"{self.label} is {self.downscale} times smaller than the clip, so the {name} must be a multiple of "
                    f"{step}, not {side}. Nearest: {f'{below} or ' if below else ''}{below + step}."
                )

    def writes(self, clip: ClipShape) -> range:
        return NOTHING

    def grid(self, clip: ClipShape) -> tuple[int, int, int]:
        """Latent frames, rows and columns of the added tokens."""
        frames = (len(self.selected(clip)) - 1) // VIDEO_TIME_FACTOR + 1
        return frames, clip.latent_height // self.downscale, clip.latent_width // self.downscale

    def selected(self, clip: ClipShape) -> list[int]:
        """Which of the frames are encoded: 0, 1, 1 + S, 1 + 2S ..., cut to 8k + 1 of them."""
        count = min(len(self.frames), clip.frames)
        chosen = [0, *range(1, count, self.temporal_scale)]
        return chosen[: (len(chosen) - 1) // VIDEO_TIME_FACTOR * VIDEO_TIME_FACTOR + 1]

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        frames = self.frames[self.selected(clip)]
        pixels = clip_pixels(frames, clip.height // self.downscale, clip.width // self.downscale)
        tokens = patchify_video(encoders.video(pixels))
        positions = reference_positions(self.grid(clip), clip.fps, self.downscale, self.temporal_scale)
        return replace(states, video=states.video.append(tokens, positions, self.strength))


def reference_positions(grid: tuple[int, int, int], fps: float, downscale: int = 1, temporal_scale: int = 1) -> Tensor:
    """Bounds [1, 3, T, 2] of a reference's tokens, spread over the clip that it is smaller than (ltx-core 1.2)."""
    bounds = pixel_bounds(grid)
    bounds[0] = bounds[0] * temporal_scale / fps
    if temporal_scale != 1:
        bounds[0] = (bounds[0] - (temporal_scale - 1) / fps).clamp(min=0)
    bounds[1:] *= downscale
    return bounds[None]
