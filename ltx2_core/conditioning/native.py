"""ComfyUI's LATENT with video and sound, as one of ours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..av import AV
from ..shapes import VIDEO_SPACE_FACTOR, VIDEO_TIME_FACTOR, ClipShape
from .latent import AVLatent

Pair = tuple[Tensor, Tensor | None]


def from_native(samples: Pair, masks: Pair | None, fps: float) -> AVLatent:
    """A latent from native tensors.

    samples: video [B, C, F, H, W] and audio [B, C, T, M], normalised. masks: of both, or of the video alone, in any
    of the native shapes; 1 = generate, 0 = keep.
    Raises ValueError for samples without sound and for masks that drop tokens (guides that were appended natively).
    """
    video, audio = samples
    if audio is None or video.ndim != 5 or audio.ndim != 4:
        shapes = " and ".join(str(list(part.shape)) for part in samples if part is not None)
        raise ValueError(
            f"a LATENT with video [B, C, F, H, W] and sound [B, C, T, M] is needed, found {shapes}: join them with LTXV "
            "Concat AV Latent"
        )
    frames, height, width = video.shape[2:]
    clip = ClipShape((frames - 1) * VIDEO_TIME_FACTOR + 1, height * VIDEO_SPACE_FACTOR, width * VIDEO_SPACE_FACTOR, fps)
    kept: AV[Tensor] = AV()
    if masks is not None:
        # a native mask of the video alone leaves the sound without one
        kept = AV(_video_mask(masks[0], video))
        if masks[1] is not None:
            kept = AV(kept.video, _audio_mask(masks[1], audio))
    return AVLatent(clip, AV(video.float().cpu(), audio.float().cpu()), kept)


def _video_mask(mask: Tensor, video: Tensor) -> Tensor:
    """To [B, 1, F, H, W]; an image-like mask holds for all frames, other sizes are resized."""
    mask = _checked(mask)
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 3:
        mask = mask[:, None, None]
    if mask.ndim == 4:
        mask = mask[:, :, None]
    mask = mask[:, :1]
    if mask.shape[2:] != video.shape[2:]:
        mask = F.interpolate(mask, size=tuple(video.shape[2:]), mode="trilinear", align_corners=False)
    return mask.expand(video.shape[0], -1, -1, -1, -1)


def _audio_mask(mask: Tensor, audio: Tensor) -> Tensor:
    """To [B, 1, T, 1]; native masks repeat over channels and mel bins."""
    mask = _checked(mask)
    if mask.ndim != 4:
        raise ValueError(f"the sound's noise mask must be [B, C, T, M], found {list(mask.shape)}")
    mask = mask[:, :1, :, :1]
    if mask.shape[2] != audio.shape[2]:
        raise ValueError(f"the sound's noise mask has {mask.shape[2]} steps, the sound {audio.shape[2]}")
    return mask.expand(audio.shape[0], -1, -1, -1)


def _checked(mask: Tensor) -> Tensor:
    mask = mask.float().cpu()
    if not bool(torch.isfinite(mask).all()) or float(mask.min()) < 0 or float(mask.max()) > 1:
        raise ValueError(
            "the noise mask has values outside 0..1: guides that native nodes appended cannot be taken over; crop them "
            "with LTXV Crop Guides first"
        )
    return mask
