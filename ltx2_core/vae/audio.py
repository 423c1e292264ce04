"""Audio autoencoder: stereo log-mel spectrograms to latents and back.

Every map is [B, channels, time, mel]; convolutions are causal in time and symmetric in mel.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.audio import AudioVAEConfig
from .mel import log_mel
from .resample import resample


class AudioEncoder(nn.Module):
    """Log-mel to normalised latents; the mean of the posterior, never a sample."""

    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        fine, middle, coarse = config.widths
        blocks = config.num_res_blocks
        self.latent_channels = config.latent_channels
        self.conv_in = CausalConv2d(2, fine, 3)
        self.down = nn.ModuleList(
            [
                _level(fine, fine, blocks, downsample=Downsample(fine)),
                _level(fine, middle, blocks, downsample=Downsample(middle)),
                _level(middle, coarse, blocks),
            ]
        )
        self.mid = _mid(coarse)
        self.conv_out = CausalConv2d(coarse, 2 * config.latent_channels, 3)
        self.per_channel_statistics = TokenStatistics(config)

    def forward(self, log_mel: Tensor, on_stage: Callable[[], None] | None = None) -> Tensor:
        """Encode a spectrogram.

        log_mel: [B, 2, M, mel_bins]. Returns [B, latent_channels, ceil(M / 4), mel_bins / 4] in the module's dtype.
        on_stage: called after each level; may raise to interrupt.
        """
        x = self.conv_in(log_mel.to(self.conv_in.conv.weight.dtype))
        for level in self.down:
            x = level(x)
            if on_stage is not None:
                on_stage()
        x = self.conv_out(F.silu(pixel_norm(self.mid(x))))
        # the second half is the posterior's log-variance
        return self.per_channel_statistics.normalise(x[:, : self.latent_channels])


class AudioDecoder(nn.Module):
    """Normalised latents to log-mel."""

    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        fine, middle, coarse = config.widths
        blocks = config.num_res_blocks + 1
        self.conv_in = CausalConv2d(config.latent_channels, coarse, 3)
        self.mid = _mid(coarse)
        self.up = nn.ModuleList(
            [
                _level(middle, fine, blocks),
                _level(coarse, middle, blocks, upsample=Upsample(middle)),
                _level(coarse, coarse, blocks, upsample=Upsample(coarse)),
            ]
        )
        self.conv_out = CausalConv2d(fine, 2, 3)
        self.per_channel_statistics = TokenStatistics(config)

    def forward(self, latents: Tensor, on_stage: Callable[[], None] | None = None) -> Tensor:
        """Decode to a spectrogram.

        latents: [B, latent_channels, T, mel_bins / 4]. Returns [B, 2, 4 * T - 3, mel_bins] in the module's dtype.
        on_stage: called after each level; may raise to interrupt.
        """
        x = self.per_channel_statistics.denormalise(latents.to(self.conv_in.conv.weight.dtype))
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
            if on_stage is not None:
                on_stage()
        return self.conv_out(F.silu(pixel_norm(x)))


def encode_waveform(encoder: AudioEncoder, waveform: Tensor, sample_rate: int, config: AudioVAEConfig) -> Tensor:
    """Encode a waveform at any sample rate; mono plays on both sides, of more than two channels the first two count.

    waveform: [B, C, N], float in [-1, 1]; moved to the encoder's device.
    Returns [B, latent_channels, T, mel_bins / 4], T = ceil(mel frames / 4).
    Raises ValueError for a waveform of another shape or shorter than half a transform window.
    """
    if waveform.ndim != 3 or 0 in waveform.shape:
        raise ValueError(f"a waveform must be [batch, channels, samples], found shape {list(waveform.shape)}")
    if waveform.shape[1] == 1:
        waveform = waveform.expand(-1, 2, -1)
    waveform = waveform[:, :2].to(encoder.conv_in.conv.weight.device, torch.float32)
    waveform = resample(waveform, sample_rate, config.sample_rate)
    shortest = config.mel.n_fft // 2 + 1
    if waveform.shape[-1] < shortest:
        raise ValueError(
            f"the sound has {waveform.shape[-1]} samples at {config.sample_rate} Hz; encoding needs at least {shortest} "
            f"({shortest / config.sample_rate:.3f} s)"
        )
    return encoder(log_mel(waveform, config))


def fit_latents(latents: Tensor, num_latents: int) -> Tensor:
    """Keep the first ``num_latents`` latents, or append zeros (in normalised space): [B, C, T, F] -> [B, C, n, F]."""
    # a negative pad crops
    return F.pad(latents, (0, 0, 0, num_latents - latents.shape[2]))


class TokenStatistics(nn.Module):
    """Mean and standard deviation of every (channel, mel bin), in token order: channel-major, mel bin fastest."""

    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        self.shape = (config.latent_channels, 1, config.latent_mel_bins)
        self.register_buffer("mean-of-means", torch.empty(config.token_width))
        self.register_buffer("std-of-means", torch.empty(config.token_width))

    def normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return latents * std + mean

    def _statistics(self) -> tuple[Tensor, Tensor]:
        return self.get_buffer("mean-of-means").view(self.shape), self.get_buffer("std-of-means").view(self.shape)


class CausalConv2d(nn.Module):
    """Convolution that sees the past in time and both neighbours in mel; keeps the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        side, past = kernel_size // 2, kernel_size - 1
        self.padding = (side, side, past, 0)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = CausalConv2d(in_channels, out_channels, 3)
        self.conv2 = CausalConv2d(out_channels, out_channels, 3)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else CausalConv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(pixel_norm(x)))
        h = self.conv2(F.silu(pixel_norm(h)))
        return self.nin_shortcut(x) + h


class Downsample(nn.Module):
    """[B, C, t, m] -> [B, C, ceil(t / 2), m / 2]"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 2, 0)))


class Upsample(nn.Module):
    """[B, C, t, m] -> [B, C, 2 * t - 1, 2 * m]"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        # the first of the doubled rows would lie before the sound starts
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))[:, :, 1:]


def pixel_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over channels (Karras et al. 2018); no weights."""
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


def _level(in_channels: int, out_channels: int, num_blocks: int, **resize: nn.Module) -> nn.Sequential:
    widths = [in_channels] + [out_channels] * num_blocks
    blocks = nn.Sequential(*(ResBlock(a, b) for a, b in pairwise(widths)))
    return nn.Sequential(OrderedDict(block=blocks, **resize))


def _mid(channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(block_1=ResBlock(channels, channels), block_2=ResBlock(channels, channels)))
