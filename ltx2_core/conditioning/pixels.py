"""Pictures as the video encoder takes them: scaled to cover the clip, cut at the centre, in [-1, 1].

Order as in ltx-pipelines 1.2: re-compress, scale (bilinear, no antialias), cut.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..media import recompress_image


def clip_pixels(pictures: Tensor, height: int, width: int, crf: int = 0) -> Tensor:
    """Prepare one picture [H, W, 3] or several [N, H, W, 3] in 0..1 for the encoder.

    crf: H.264 re-compression of each picture before anything else; 0 leaves them alone.
    Returns [1, 3, N, height, width] float32 in [-1, 1].
    """
    pictures = pictures if pictures.ndim == 4 else pictures[None]
    pixels = torch.empty(1, 3, pictures.shape[0], height, width)
    # frame by frame: a source clip in float32 is large enough without a second copy
    for index, picture in enumerate(pictures):
        rgb = (picture.cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
        if crf > 0 and min(rgb.shape[:2]) >= 2:
            rgb = torch.from_numpy(recompress_image(rgb.numpy(), crf))
        pixels[0, :, index] = cover(rgb.permute(2, 0, 1)[None].float(), height, width)[0] / 127.5 - 1
    return pixels


def cover(picture: Tensor, height: int, width: int) -> Tensor:
    """Scale [1, 3, h, w] so that it covers height x width, and cut the centre."""
    h, w = picture.shape[-2:]
    scale = max(height / h, width / w)
    size = (math.ceil(h * scale), math.ceil(w * scale))
    picture = F.interpolate(picture, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return picture[..., top : top + height, left : left + width]


def visible_part(mask: Tensor, height: int, width: int) -> Tensor:
    """The part of a mask [M, h, w] that stays when its picture is scaled to cover height x width and cut."""
    h, w = mask.shape[-2:]
    scale = max(height / h, width / w)
    rows, columns = max(1, round(height / scale)), max(1, round(width / scale))
    top, left = (h - rows) // 2, (w - columns) // 2
    return mask[..., top : top + rows, left : left + columns]
