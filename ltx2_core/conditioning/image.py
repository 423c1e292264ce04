"""An image that the clip starts from: preparation, and its place in the latent."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..media import recompress_image
from ..shapes import ClipShape
from .state import LatentState, patchify_video


@dataclass(frozen=True)
class ImageCondition:
    """Keep an image as the first frame of the clip.

    image: [H, W, 3] in 0..1. strength: 1 keeps the image exactly, 0 ignores it.
    crf: H.264 re-compression of the image before it is used (0 = none, ``None`` = the model version's default).
    """

    image: Tensor = field(repr=False)
    strength: float
    crf: int | None = None

    def pixels(self, clip: ClipShape, default_crf: int) -> Tensor:
        """The image as the encoder takes it: [1, 3, 1, H, W] float32 in [-1, 1], covering the clip's size.

        Order as in ltx-pipelines 1.2: re-compress, scale to cover (bilinear, no antialias), cut the centre.
        """
        rgb = (self.image.float().clamp(0, 1) * 255).round().to(torch.uint8)
        crf = default_crf if self.crf is None else self.crf
        if crf > 0 and min(rgb.shape[:2]) >= 2:
            rgb = torch.from_numpy(recompress_image(rgb.cpu().numpy(), crf))
        picture = rgb.permute(2, 0, 1)[None].float()
        return (_cover(picture, clip.height, clip.width) / 127.5 - 1)[:, :, None]

    def apply(self, state: LatentState, latent: Tensor) -> LatentState:
        """Write the encoded image [1, C, 1, H', W'] over the first latent frame."""
        tokens = patchify_video(latent).to(state.clean)
        return state.write(tokens.expand(state.clean.shape[0], -1, -1), 0, self.strength)


def _cover(picture: Tensor, height: int, width: int) -> Tensor:
    """Scale [1, 3, h, w] so that it covers height x width, and cut the centre."""
    h, w = picture.shape[-2:]
    scale = max(height / h, width / w)
    size = (math.ceil(h * scale), math.ceil(w * scale))
    picture = F.interpolate(picture, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return picture[..., top : top + height, left : left + width]
