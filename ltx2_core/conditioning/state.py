"""The tokens of one stream while it is sampled: content, what is kept, and where each token stands."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..shapes import VIDEO_SPACE_FACTOR, VIDEO_TIME_FACTOR, ClipShape
from .attention import extended_mask


@dataclass(frozen=True)
class LatentState:
    """One stream's tokens. The target's come first; conditioning tokens are appended behind them.

    latent: [B, T, C] what sampling starts from. clean: [B, T, C] content of the tokens that are kept.
    mask: [B, T, 1] float32, 1 = generate, 0 = keep the clean content.
    positions: [1, axes, T, 2] float32 bounds (video: seconds, px, px; audio: seconds).
    keyframes_mask: [1, T, 1] float32, 1 on tokens of a latent frame that encodes one pixel frame; video only.
    num_target: how many of the T tokens are the target's.
    frozen: the stream is held fixed: every token is kept, and its modules see noise level 0.
    attention_mask: [B, T, T] in the latent's dtype, how strongly tokens see each other in 0..1; ``None`` = fully.
    slots: tokens of generated keyframes, behind the target's.
    """

    latent: Tensor
    clean: Tensor
    mask: Tensor
    positions: Tensor
    num_target: int
    keyframes_mask: Tensor | None = None
    frozen: bool = False
    attention_mask: Tensor | None = None
    slots: range = range(0)

    def write(self, tokens: Tensor, start: int, strength: float) -> LatentState:
        """Keep ``tokens`` [1 or B, N, C] in place of the target's tokens from ``start`` on; ``strength`` 1 keeps them fully."""
        stop = start + tokens.shape[1]
        assert stop <= self.num_target, f"tokens {start}..{stop} exceed the target's {self.num_target}"
        clean, mask = self.clean.clone(), self.mask.clone()
        clean[:, start:stop] = tokens.to(clean.dtype)
        mask[:, start:stop] = 1.0 - strength
        return replace(self, clean=clean, mask=mask)

    def append(self, tokens: Tensor, positions: Tensor, strength: float) -> LatentState:
        """Add conditioning tokens [1 or B, N, C] at ``positions`` [1, axes, N, 2]; they start empty, never marked."""
        tokens = tokens.to(self.latent).expand(self.latent.shape[0], -1, -1)
        return self._extended(torch.zeros_like(tokens), tokens, positions, 0.0 if self.frozen else 1.0 - strength, 0.0)

    def append_slots(self, tokens: Tensor, positions: Tensor) -> LatentState:
        """Add tokens [1 or B, N, C] that are generated as keyframes; sampling starts from their content.

        Raises ValueError for a second set of them.
        """
        if self.slots:
            raise ValueError("a clip has one set of generated keyframes: put all their frames into one")
        start = self.latent.shape[1]
        tokens = tokens.to(self.latent).expand(self.latent.shape[0], -1, -1)
        wider = self._extended(tokens, torch.zeros_like(tokens), positions, 1.0, 1.0)
        return replace(wider, slots=range(start, start + tokens.shape[1]))

    def start_from(self, tokens: Tensor, mask: Tensor) -> LatentState:
        """Take the target's content from ``tokens`` [1 or B, N, C]; ``mask`` [N] says what is generated anew.

        An empty target also starts from them; one with content (a second stage) goes on from its own.
        """
        n = self.num_target
        assert tokens.shape[1] == n, f"{tokens.shape[1]} tokens for a target of {n}"
        tokens = tokens.to(self.latent).expand(self.latent.shape[0], -1, -1)
        mask = mask.to(self.mask)[None, :, None].expand(tokens.shape[0], -1, -1)
        empty = not bool(self.latent[:, :n].any())
        return replace(
            self,
            latent=torch.cat((tokens, self.latent[:, n:]), 1) if empty else self.latent,
            clean=torch.cat((tokens, self.clean[:, n:]), 1),
            mask=torch.cat((mask, self.mask[:, n:]), 1),
        )

    def freeze(self, tokens: Tensor) -> LatentState:
        """Hold the whole stream at ``tokens`` [1 or B, N, C]: noise of any scale leaves it, since nothing is masked in."""
        n = self.num_target
        kept = self.start_from(tokens, self.mask.new_zeros(n))
        latent = torch.cat((kept.clean[:, :n], kept.latent[:, n:]), 1)
        return replace(kept, latent=latent, mask=torch.zeros_like(kept.mask), frozen=True)

    def _extended(self, latent: Tensor, clean: Tensor, positions: Tensor, level: float, mark: float) -> LatentState:
        batch, count, _ = latent.shape
        # rounded to the latent's dtype, as in ltx-core 1.2
        levels = latent.new_full((batch, count, 1), level).to(self.mask)
        marks, attention = self.keyframes_mask, self.attention_mask
        if attention is not None:
            attention = extended_mask(attention, self.num_target, attention.shape[1], attention.new_ones(batch, count))
        if marks is not None:
            marks = torch.cat((marks, marks.new_full((marks.shape[0], count, 1), mark)), 1)
        return replace(
            self,
            latent=torch.cat((self.latent, latent), 1),
            clean=torch.cat((self.clean, clean), 1),
            mask=torch.cat((self.mask, levels), 1),
            positions=torch.cat((self.positions, positions.to(self.positions)), 2),
            keyframes_mask=marks,
            attention_mask=attention,
        )

    def target(self, x: Tensor) -> Tensor:
        """The target's part of tokens [B, T, C]."""
        return x[:, : self.num_target]


def video_state(latents: Tensor, clip: ClipShape) -> LatentState:
    """State of a clip's video from latents [B, C, F, H, W] (zeros for a new clip)."""
    tokens = patchify_video(latents)
    marks = torch.zeros(1, tokens.shape[1], 1, device=tokens.device)
    # the first latent frame holds one pixel frame
    marks[:, : clip.latent_height * clip.latent_width] = 1.0
    positions = video_positions(clip.grid, clip.fps).to(tokens.device)
    return LatentState(tokens, tokens, _ones(tokens), positions, tokens.shape[1], marks)


def audio_state(latents: Tensor) -> LatentState:
    """State of a sound from latents [B, C, T, M] (zeros for a new one)."""
    tokens = patchify_audio(latents)
    positions = audio_positions(tokens.shape[1]).to(tokens.device)
    return LatentState(tokens, tokens, _ones(tokens), positions, tokens.shape[1])


def _ones(tokens: Tensor) -> Tensor:
    return torch.ones(*tokens.shape[:2], 1, device=tokens.device, dtype=torch.float32)


def patchify_video(latents: Tensor) -> Tensor:
    """[B, C, F, H, W] -> [B, F * H * W, C], frame by frame, row by row."""
    return latents.flatten(2).transpose(1, 2).contiguous()


def unpatchify_video(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[B, F * H * W, C] -> [B, C, F, H, W]"""
    return tokens.transpose(1, 2).unflatten(2, grid).contiguous()


def patchify_audio(latents: Tensor) -> Tensor:
    """[B, C, T, M] -> [B, T, C * M], channel by channel."""
    return latents.transpose(1, 2).flatten(2).contiguous()


def unpatchify_audio(tokens: Tensor, channels: int) -> Tensor:
    """[B, T, C * M] -> [B, C, T, M]"""
    return tokens.unflatten(2, (channels, -1)).transpose(1, 2).contiguous()


def video_positions(grid: tuple[int, int, int], fps: float) -> Tensor:
    """Bounds [1, 3, F * H * W, 2] float32: seconds, rows and columns in pixels (ltx-core 1.2)."""
    bounds = pixel_bounds(grid)
    bounds[0] /= fps
    return bounds[None]


def pixel_bounds(grid: tuple[int, int, int], *, starts_clip: bool = True) -> Tensor:
    """Bounds [3, F * H * W, 2] float32 of latent cells in pixel frames, rows and columns.

    Where they start a clip, the first latent frame is one pixel frame: time shifts by 7 frames and is cut at 0.
    """
    frames, height, width = (torch.arange(n, dtype=torch.float32) for n in grid)
    starts = torch.stack(torch.meshgrid(frames, height, width, indexing="ij")).flatten(1)
    bounds = torch.stack((starts, starts + 1), dim=-1)
    factors = bounds.new_tensor([VIDEO_TIME_FACTOR, VIDEO_SPACE_FACTOR, VIDEO_SPACE_FACTOR])
    bounds = bounds * factors[:, None, None]
    if starts_clip:
        bounds[0] = (bounds[0] + 1 - VIDEO_TIME_FACTOR).clamp(min=0)
    return bounds


def audio_positions(count: int) -> Tensor:
    """Bounds [1, 1, T, 2] float32 in seconds: [0, 0.01), [0.01, 0.05), [0.05, 0.09) ... (ltx-core 1.2)."""
    mel = (4 * torch.arange(count + 1, dtype=torch.float32) + 1 - 4).clamp(min=0)
    seconds = mel * 160 / 16000
    return torch.stack((seconds[:-1], seconds[1:]), dim=-1)[None, None]
