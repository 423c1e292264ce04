"""The latent upsampler: more latent height and width, or more latent frames, without a decode in between."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import depth_to_space
from ..config.upsampler import NORM_GROUPS, UpsamplerConfig
from .layers import PerChannelStatistics


def upsample(
    module: LatentUpsampler,
    statistics: PerChannelStatistics,
    latents: Tensor,
    on_stage: Callable[[], None] | None = None,
) -> Tensor:
    """Upsample normalised latents: un-normalise, run the upsampler, normalise.

    latents: [B, C, F, H, W]; taken to the upsampler's dtype, in which the statistics are applied too.
    on_stage: called ``config.num_stages`` times; what it raises ends the run.
    Returns [B, C, F', H', W'] of ``config.output_grid`` in the dtype of ``latents``.
    """
    x = statistics.unnormalize(latents.to(module.initial_conv.weight))
    return statistics.normalize(module(x, on_stage)).to(latents.dtype)


class LatentUpsampler(nn.Module):
    """Residual blocks, a resampler, residual blocks. Every norm spans the whole clip, so a clip is never cut up."""

    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        self.config = config
        mid = config.mid_channels
        self.initial_conv = nn.Conv3d(config.latent_channels, mid, 3, padding=1)
        self.initial_norm = nn.GroupNorm(NORM_GROUPS, mid)
        self.res_blocks = _res_blocks(config)
        self.upsampler = _resampler(config)
        self.post_upsample_res_blocks = _res_blocks(config)
        self.final_conv = nn.Conv3d(mid, config.latent_channels, 3, padding=1)

    def forward(self, latents: Tensor, on_stage: Callable[[], None] | None = None) -> Tensor:
        """latents: un-normalised, [B, C, F, H, W] in the weights' dtype. Returns those of ``config.output_grid``."""
        x = F.silu(self.initial_norm(self.initial_conv(latents)), inplace=True)
        for stage in (*self.res_blocks, self.upsampler, *self.post_upsample_res_blocks):
            x = stage(x)
            if on_stage is not None:
                on_stage()
        return self.final_conv(x)


class _ResBlock(nn.Module):
    """SiLU(x + norm2(conv2(SiLU(norm1(conv1(x))))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(NORM_GROUPS, channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)), inplace=True)
        return F.silu(self.norm2(self.conv2(h)).add_(x), inplace=True)


def _res_blocks(config: UpsamplerConfig) -> nn.ModuleList:
    return nn.ModuleList(_ResBlock(config.mid_channels) for _ in range(config.num_blocks_per_stage))


def _resampler(config: UpsamplerConfig) -> nn.Module:
    if config.temporal:
        return _TemporalDouble(config.mid_channels)
    if config.rational:
        return _Rational(config.mid_channels, config.spatial_ratio)
    return _SpatialDouble(config.mid_channels)


class _SpatialDouble(nn.Sequential):
    """Every frame for itself: a convolution to four times the channels, which become 2 x 2 cells."""

    def __init__(self, channels: int):
        super().__init__(nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return _per_frame(super().forward, x)


class _TemporalDouble(nn.Sequential):
    """A convolution to twice the channels, which become two frames; the first frame of the clip is dropped."""

    def __init__(self, channels: int):
        super().__init__(nn.Conv3d(channels, 2 * channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(super().forward(x), (2, 1, 1))[:, :, 1:]


class _Rational(nn.Module):
    """Every frame for itself: enlarged by the ratio's numerator, then blurred and thinned by its denominator."""

    def __init__(self, channels: int, ratio: Fraction):
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(channels, ratio.numerator**2 * channels, 3, padding=1)
        self.blur_down = _BlurDown(ratio.denominator)

    def forward(self, x: Tensor) -> Tensor:
        return _per_frame(self._resample, x)

    def _resample(self, frames: Tensor) -> Tensor:
        return self.blur_down(F.pixel_shuffle(self.conv(frames), self.ratio.numerator))


class _BlurDown(nn.Module):
    """Keeps every ``stride``-th cell of the blurred frames; at stride 1 the frames stay as they are, unblurred."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride
        self.register_buffer("kernel", binomial_kernel())

    def forward(self, frames: Tensor) -> Tensor:
        if self.stride == 1:
            return frames
        channels = frames.shape[1]
        kernel = self.get_buffer("kernel").expand(channels, -1, -1, -1)
        return F.conv2d(frames, kernel, stride=self.stride, padding=2, groups=channels)


def binomial_kernel() -> Tensor:
    """The 5 x 5 blur of the rational upsamplers as [1, 1, 5, 5]: rows of Pascal's triangle, exact in bfloat16."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    return torch.outer(row, row)[None, None]


def _per_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of pictures [N, C, H, W] to the frames of [B, C, F, H, W]."""
    frames = function(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
