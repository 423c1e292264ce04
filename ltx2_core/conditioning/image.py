"""Pictures in place of the clip's own latent frames: the first image, an image further on, a piece of a clip."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..av import AV
from ..shapes import VIDEO_TIME_FACTOR, ClipShape
from .checks import check_pictures, check_share
from .condition import Encoders
from .pixels import clip_pixels
from .state import LatentState, patchify_video


@dataclass(frozen=True)
class ImageCondition:
    """Keep an image, or a piece of a clip, in place of latent frames; without ``latent_index`` the clip starts with it.

    image: [H, W, 3] in 0..1, or [N, H, W, 3] with N = 8k + 1 frames, which take k + 1 latent frames.
    strength: 1 keeps the image exactly, 0 ignores it.
    crf: H.264 re-compression of a single image before it is used (0 = none, ``None`` = the model version's default).
    latent_index: the latent frame that it is written to; negative counts from the end.
    """

    stream: ClassVar[str] = "video"
    image: Tensor = field(repr=False)
    strength: float
    crf: int | None = None
    latent_index: int = 0

    @property
    def label(self) -> str:
        return "the first image" if self.latent_index == 0 else f"the image at latent frame {self.latent_index}"

    def check(self, clip: ClipShape) -> None:
        check_pictures(self.label, self.image)
        check_share(f"the strength of {self.label}", self.strength)
        check_crf(self.image, self.crf)
        frames, span = clip.latent_frames, self.writes(clip)
        if not -frames <= self.latent_index < frames:
            raise ValueError(f"{self.label} is outside the clip, which has latent frames 0 to {frames - 1}")
        if span.stop > frames:
            raise ValueError(
                f"{self.label} has {len(span)} latent frames ({self.image.shape[0]} frames) and would end behind the "
                f"clip's last, {frames - 1}: use an index up to {frames - len(span)}, or fewer frames"
            )

    def writes(self, clip: ClipShape) -> range:
        count = self.image.shape[0] if self.image.ndim == 4 else 1
        start = self.latent_index % clip.latent_frames
        return range(start, start + (count - 1) // VIDEO_TIME_FACTOR + 1)

    def pixels(self, clip: ClipShape, default_crf: int) -> Tensor:
        """The image as the encoder takes it: [1, 3, N, H, W] float32 in [-1, 1], covering the clip's size."""
        return clip_pixels(self.image, clip.height, clip.width, image_crf(self.image, self.crf, default_crf))

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        tokens = patchify_video(encoders.video(self.pixels(clip, encoders.default_crf)))
        start = self.writes(clip).start * clip.latent_height * clip.latent_width
        return replace(states, video=states.video.write(tokens, start, self.strength))


def check_crf(pictures: Tensor, crf: int | None) -> None:
    """Refuse a compression outside H.264's range, or of a clip: the model was trained with single images compressed."""
    if crf is not None and not 0 <= crf <= 51:
        raise ValueError(f"crf is {crf}; choose 0 (none) to 51")
    if crf and pictures.ndim == 4 and pictures.shape[0] > 1:
        raise ValueError(f"crf {crf} is for single images, but there are {pictures.shape[0]} frames: set it to 0")


def image_crf(pictures: Tensor, crf: int | None, default: int) -> int:
    """The re-compression that pictures get: of a single image the default unless one was chosen, of a clip none."""
    if pictures.ndim == 4 and pictures.shape[0] > 1:
        return 0
    return default if crf is None else crf
