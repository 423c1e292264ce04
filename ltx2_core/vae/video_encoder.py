"""The causal video encoder of LTX-2: pixels to normalised latents, whole or streamed along time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from ...kernels import pixel_norm_silu
from ..config.video_vae import ResStackConfig, VideoEncoderConfig
from .layers import Downsample, PerChannelStatistics, ResStack, TimeConv3d, patchify
from .video_streaming import Layer, Memory, Step, flow, with_last


class HasEncoderConfig(Protocol):
    """A VAE configuration whose encoder is the causal convolutional one."""

    @property
    def encoder(self) -> VideoEncoderConfig: ...


class VideoEncoder(nn.Module):
    """Checkpoint names `vae.encoder.X` are this module's `X`; `vae.per_channel_statistics.X` keep their name."""

    def __init__(self, config: HasEncoderConfig):
        super().__init__()
        self.config = cfg = config.encoder
        mode = cfg.padding_mode
        in_channels = cfg.in_channels * cfg.patch_size**2
        self.conv_in = TimeConv3d(in_channels, cfg.base_channels, padding_mode=mode, causal=True)
        self.down_blocks = nn.ModuleList(
            ResStack(block.channels, block.num_layers, padding_mode=mode, causal=True)
            if isinstance(block, ResStackConfig)
            else Downsample(block, padding_mode=mode)
            for block in cfg.blocks
        )
        last = cfg.blocks[-1]
        channels = last.channels if isinstance(last, ResStackConfig) else last.out_channels
        self.conv_out = TimeConv3d(channels, cfg.out_channels, padding_mode=mode, causal=True)
        self.per_channel_statistics = PerChannelStatistics(cfg.latent_channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode a clip.

        pixels: [B, 3, F, H, W] in [-1, 1]; F = 8k + 1, H and W multiples of 32.
        Returns normalised latents [B, C, k + 1, H / 32, W / 32] in the weights' dtype: the posterior's means.
        Raises ValueError for other sizes, with the nearest valid ones.
        """
        return torch.cat(list(self.stream(pixels, pixels.shape[2] + self.config.temporal_factor)), dim=2)

    def stream(self, pixels: Tensor, chunk_frames: int) -> Iterator[Tensor]:
        """Encode as ``forward`` does, in pieces of about ``chunk_frames`` pixel frames; yield latents in order.

        ``pixels`` may lie on another device or have another dtype than the weights: every piece is converted.
        """
        self._check(pixels)
        factor = self.config.temporal_factor
        step = max(1, chunk_frames // factor) * factor
        # the first piece holds one frame more: 1 + 8a, then 8a
        ends = [*range(1 + step, pixels.shape[2], step), pixels.shape[2]]
        starts = [0, *ends[:-1]]
        pieces = [pixels[:, :, a:b] for a, b in zip(starts, ends, strict=True)]
        steps, memory = self._steps(), Memory()
        for piece, last in with_last(pieces):
            yield from flow(steps, piece, memory, last)

    def _steps(self) -> list[Step]:
        layers: list[Layer] = [self._head]
        for block in self.down_blocks:
            layers.extend(block.res_blocks if isinstance(block, ResStack) else [block])
        return [Step(layer, 1.0) for layer in (*layers, self._tail)]

    def _head(self, pixels: Tensor, memory: Memory, last: bool) -> Tensor:
        weight = self.conv_in.conv.weight
        x = patchify(pixels.to(weight.device, weight.dtype), self.config.patch_size)
        return self.conv_in(x, memory, last)

    def _tail(self, x: Tensor, memory: Memory, last: bool) -> Tensor:
        moments = self.conv_out(x, memory, last, pixel_norm_silu)
        return self.per_channel_statistics.normalize(moments[:, : self.config.latent_channels])

    def _check(self, pixels: Tensor) -> None:
        space, time = self.config.spatial_factor, self.config.temporal_factor
        if pixels.ndim != 5 or pixels.shape[1] != self.config.in_channels:
            raise ValueError(
                f"pixels must be [batch, {self.config.in_channels}, frames, height, width], got {tuple(pixels.shape)}"
            )
        frames, height, width = pixels.shape[2:]
        if frames < 1 or (frames - 1) % time:
            low = max(0, frames - 1) // time * time + 1
            raise ValueError(f"{frames} frames cannot be encoded: use {time}k + 1, nearest {low} or {low + time}")
        for name, size in (("height", height), ("width", width)):
            if size < space or size % space:
                low = size // space * space
                nearest = f"{low} or {low + space}" if low else f"{space}"
                raise ValueError(f"{name} {size} cannot be encoded: use a multiple of {space}, nearest {nearest}")
        if self.config.padding_mode == "reflect" and min(height, width) < 2 * space:
            raise ValueError(
                f"{width}x{height} is too small for an encoder with reflect padding; use {2 * space}x{2 * space} or more"
            )
