"""Waveform generator: HiFi-GAN (Kong et al. 2020), and BigVGAN (Lee et al. 2023) with its anti-aliased activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.audio import MEL_BINS, GeneratorConfig

_RESBLOCK_KERNELS = (3, 7, 11)
_DILATIONS = (1, 3, 5)
_FILTER_TAPS = 12


class Generator(nn.Module):
    """Stereo log-mel to stereo waveform. Each stage upsamples, then averages three residual blocks."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        widths = config.widths
        self.final_activation = config.final_activation
        self.conv_pre = nn.Conv1d(2 * MEL_BINS, widths[0], 7, padding=3)
        self.act_up = nn.Identity() if config.anti_aliased else nn.LeakyReLU(0.1)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(before, after, kernel, stride=rate, padding=(kernel - rate) // 2)
            for before, after, kernel, rate in zip(
                widths[:-1], widths[1:], config.upsample_kernels, config.upsample_rates, strict=True
            )
        )
        self.resblocks = nn.ModuleList(
            ResBlock(width, kernel, config.anti_aliased) for width in widths[1:] for kernel in _RESBLOCK_KERNELS
        )
        # HiFi-GAN's last slope differs from all others
        self.act_post = AntiAliasedSnakeBeta(widths[-1]) if config.anti_aliased else nn.LeakyReLU(0.01)
        self.conv_post = nn.Conv1d(widths[-1], 2, 7, padding=3, bias=config.output_bias)

    def forward(self, log_mel: Tensor, on_stage: Callable[[], None] | None = None) -> Tensor:
        """Generate a waveform.

        log_mel: [B, 2, M, 64]. Returns [B, 2, samples_per_frame * M] in the weights' dtype.
        on_stage: called after each stage; may raise to interrupt.
        """
        x = log_mel.to(self.conv_pre.weight.dtype).transpose(2, 3).flatten(1, 2)  # [B, 128, M], left side first
        x = self.conv_pre(x)
        for i, upsample in enumerate(self.ups):
            x = upsample(self.act_up(x))
            x = sum(self.resblocks[3 * i + j](x) for j in range(3)) / 3
            if on_stage is not None:
                on_stage()
        x = self.conv_post(self.act_post(x))
        if self.final_activation == "tanh":
            return torch.tanh(x)
        return x.clamp(-1, 1) if self.final_activation == "clamp" else x


class ResBlock(nn.Module):
    """Pairs of a dilated and a plain convolution, each pair with its own residual connection."""

    def __init__(self, width: int, kernel: int, anti_aliased: bool):
        super().__init__()
        activation = AntiAliasedSnakeBeta if anti_aliased else _leaky_relu
        self.convs1 = nn.ModuleList(nn.Conv1d(width, width, kernel, dilation=d, padding="same") for d in _DILATIONS)
        self.convs2 = nn.ModuleList(nn.Conv1d(width, width, kernel, padding="same") for _ in _DILATIONS)
        self.acts1 = nn.ModuleList(activation(width) for _ in _DILATIONS)
        self.acts2 = nn.ModuleList(activation(width) for _ in _DILATIONS)

    def forward(self, x: Tensor) -> Tensor:
        for act1, conv1, act2, conv2 in zip(self.acts1, self.convs1, self.acts2, self.convs2, strict=True):
            x = x + conv2(act2(conv1(act1(x))))
        return x


class AntiAliasedSnakeBeta(nn.Module):
    """SnakeBeta at twice the sample rate, so that the harmonics it makes do not fold back.

    The low-pass filters come from the checkpoint: their stored rounding is part of the model.
    """

    def __init__(self, width: int):
        super().__init__()
        self.upsample = Upsample2x()
        self.act = SnakeBeta(width)
        self.downsample = Downsample2x()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.act(self.upsample(x)))


class LowPass(nn.Module):
    """Taps of one filter, shared by all channels: [1, 1, 12]."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.empty(1, 1, _FILTER_TAPS))


class Upsample2x(LowPass):
    """[B, C, L] -> [B, C, 2 * L]"""

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        x = F.pad(x, (5, 5), mode="replicate")
        return 2 * F.conv_transpose1d(x, self.filter.expand(width, -1, -1), stride=2, groups=width)[..., 15:-15]


class Downsample2x(nn.Module):
    """[B, C, 2 * L] -> [B, C, L]"""

    def __init__(self) -> None:
        super().__init__()
        self.lowpass = LowPass()

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        x = F.pad(x, (5, 6), mode="replicate")
        return F.conv1d(x, self.lowpass.filter.expand(width, -1, -1), stride=2, groups=width)


class SnakeBeta(nn.Module):
    """x + sin(a x)^2 / b, with a and b per channel stored as logarithms."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(width))
        self.beta = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        return x + torch.sin(x * a).square() / (b + 1e-9)


def _leaky_relu(width: int) -> nn.Module:
    return nn.LeakyReLU(0.1)
