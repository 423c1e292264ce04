"""Layers of the causal video VAE. Tensors are [B, C, T, H, W]; ``memory`` and ``last`` are those of video_streaming."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import depth_to_space, pixel_norm_silu
from ..config.video_vae import PaddingMode, ResampleConfig
from ..parallel.bands import Bands
from .video_streaming import Layer, Memory

Write = Callable[[Tensor, Tensor], object]
"""(x, out): stores in ``out`` what a convolution shall see of ``x``; pointwise along time."""

# cuDNN and PyTorch index convolutions with 32 bits
MAX_CONV_ELEMENTS = 2**31 - 1


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """Fold patch x patch pixels into channels: index (c * patch + dx) * patch + dy, the width offset dx slower."""
    b, c, t, h, w = pixels.shape
    x = pixels.reshape(b, c, t, h // patch, patch, w // patch, patch)
    return x.permute(0, 1, 6, 4, 2, 3, 5).reshape(b, c * patch * patch, t, h // patch, w // patch)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of ``patchify``."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c // patch**2, patch, patch, t, h, w)
    return x.permute(0, 1, 4, 5, 3, 6, 2).reshape(b, c // patch**2, t, h * patch, w * patch)


def space_to_depth(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Fold blocks of ``stride`` = (a, b, c) into channels: index ((channel * a + i) * b + j) * c + k."""
    n, channels, t, h, w = x.shape
    st, sh, sw = stride
    x = x.reshape(n, channels, t // st, st, h // sh, sh, w // sw, sw).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(n, channels * st * sh * sw, t // st, h // sh, w // sw)


def _copy(x: Tensor, out: Tensor) -> None:
    out.copy_(x)


class TimeConv3d(nn.Module):
    """A 3x3x3 convolution that repeats the clip's border frames along time and pads space with ``padding_mode``.

    Causal: two copies of the first frame in front. Otherwise one in front and one of the last frame behind; such a
    layer gives one frame less for a first piece and one more for a last one.

    Of a band of the picture, what it sees has a row more above and below: the neighbours', and at the picture's border
    those that ``padding_mode`` says. New frames get them, in one exchange; frames that were kept have them already.
    """

    def __init__(self, in_channels: int, out_channels: int, *, padding_mode: PaddingMode, causal: bool):
        super().__init__()
        self.causal = causal
        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=(0, 1, 1), padding_mode=padding_mode)

    def forward(self, x: Tensor, memory: Memory, last: bool, write: Write = _copy) -> Tensor:
        """Convolve the next piece, of which ``write`` says what the convolution shall see."""
        return self.convolve(self.padded(x, memory, last, write), memory.bands)

    def padded(self, x: Tensor, memory: Memory, last: bool, write: Write = _copy) -> Tensor:
        """What ``convolve`` is to see of the next piece: the written frames between those that time adds to them.

        Apart from ``convolve`` so that a caller may drop ``x`` in between. ``write`` goes straight into the padded
        buffer, which saves a pass over the activation.
        """
        b, c, t, h, w = x.shape
        halo = memory.bands.halo
        if t == 0:
            assert not last, "a last piece holds at least one frame"
            return x.new_empty(b, c, 0, h + 2 * halo, w)
        kept = memory.take(self)
        front = 2 if self.causal or kept is not None else 1
        behind = 1 if last and not self.causal else 0
        seen = x.new_empty(b, c, front + t + behind, h + 2 * halo, w)
        inner = seen[:, :, front : front + t]
        own = inner[:, :, :, halo : halo + h]
        write(x, own)
        if halo:
            self._surround(inner, *memory.bands.edges(own))
        seen[:, :, :front] = inner[:, :, :1] if kept is None else kept
        if behind:
            seen[:, :, -1:] = inner[:, :, -1:]
        if not last:
            memory.keep(self, seen[:, :, -2:])
        return seen

    def convolve(self, seen: Tensor, bands: Bands) -> Tensor:
        """[B, in channels, T + 2, H, W] -> [B, out channels, T, H, W]; fewer than three frames give none.

        Of a band, H rows with what surrounds them become those without it.
        """
        b, c, t, h, w = seen.shape
        frames = max(t - 2, 0)
        if frames == 0 or h == 0:
            return seen.new_empty(b, self.conv.out_channels, frames, h - 2 * bands.halo, w)
        convolve = self._in_band if bands.halo else self.conv
        per_frame = b * max(c, self.conv.out_channels) * (h + 2) * (w + 2)
        if per_frame * t <= MAX_CONV_ELEMENTS:
            return convolve(seen)
        step = max(1, MAX_CONV_ELEMENTS // per_frame - 2)
        return torch.cat([convolve(seen[:, :, i : i + step + 2]) for i in range(0, frames, step)], dim=2)

    def _surround(self, inner: Tensor, above: Tensor | None, below: Tensor | None) -> None:
        """Fill the first and the last row of [B, C, T, 1 + h + 1, W] with the neighbours', or as the border is padded."""
        for row, given in ((0, above), (-1, below)):
            if given is not None:
                inner[:, :, :, row] = given
        mirrors = self.conv.padding_mode == "reflect"
        for row, mirrored, given in ((0, 2, above), (-1, -3, below)):
            if given is None:
                # of a band of one row, what is mirrored is the other neighbour's
                inner[:, :, :, row] = inner[:, :, :, mirrored] if mirrors else 0

    def _in_band(self, seen: Tensor) -> Tensor:
        """Convolve what has its rows around it already, so that only columns are padded."""
        weight, bias = self.conv.weight, self.conv.bias
        if self.conv.padding_mode == "reflect":
            return F.conv3d(F.pad(seen, (1, 1, 0, 0, 0, 0), mode="reflect"), weight, bias)
        return F.conv3d(seen, weight, bias, padding=(0, 0, 1))


class ResBlock(nn.Module):
    """x + conv2(act(conv1(act(x)))), act = pixel norm, optional modulation by the decode timestep, SiLU."""

    def __init__(self, channels: int, *, padding_mode: PaddingMode, causal: bool, modulated: bool = False):
        super().__init__()
        self.conv1 = TimeConv3d(channels, channels, padding_mode=padding_mode, causal=causal)
        self.conv2 = TimeConv3d(channels, channels, padding_mode=padding_mode, causal=causal)
        # rows: shift1, scale1, shift2, scale2
        self.scale_shift_table = nn.Parameter(torch.zeros(4, channels)) if modulated else None

    def forward(self, x: Tensor, memory: Memory, last: bool, time_embedding: Tensor | None = None) -> Tensor:
        """time_embedding: [B, 4 * C] for a modulated block, else None."""
        first: Write = pixel_norm_silu
        second: Write = pixel_norm_silu
        if self.scale_shift_table is not None:
            assert time_embedding is not None
            rows = modulation_rows(self.scale_shift_table, time_embedding)
            first = partial(pixel_norm_silu, modulation=(rows[0], rows[1]))
            second = partial(pixel_norm_silu, modulation=(rows[2], rows[3]))
        h = self.conv1(x, memory, last, first)
        seen = self.conv2.padded(h, memory, last, second)
        # three activations at a time, not four: the hidden one is dropped before the next is made
        del h
        y = self.conv2.convolve(seen, memory.bands)
        for frames, skip in _aligned(y, memory.delay(self, x, y.shape[2], last)):
            frames.add_(skip)
        return y


def _aligned(y: Tensor, parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each part, whose frames follow one another, with the frames of ``y`` that it belongs to."""
    begin = 0
    for part in parts:
        end = begin + part.shape[2]
        yield y[:, :, begin:end], part
        begin = end


def _unfolded(x: Tensor, stride: tuple[int, int, int], skips: list[Tensor]) -> Tensor:
    """``depth_to_space`` with a skip that comes in parts."""
    if len(skips) < 2:
        return depth_to_space(x, stride, *skips)
    y = depth_to_space(x, stride)
    for frames, skip in _aligned(y, [depth_to_space(part, stride) for part in skips]):
        # the skip's channels repeat as a block: output channel c takes skip channel c mod skip channels
        frames.unflatten(1, (-1, skip.shape[1])).add_(skip.unsqueeze(1))
    return y


def modulation_rows(table: Tensor, time_embedding: Tensor) -> tuple[Tensor, ...]:
    """Rows of ``table`` [R, C] plus ``time_embedding`` [B, R * C]: R tensors [B, C, 1, 1, 1]."""
    rows = table + time_embedding.unflatten(1, table.shape)
    return rows[..., None, None, None].unbind(1)


class ResStack(nn.Module):
    """Residual blocks of one width, with one time embedding for all of them where the decoder is conditioned."""

    def __init__(
        self, channels: int, num_layers: int, *, padding_mode: PaddingMode, causal: bool, modulated: bool = False
    ):
        super().__init__()
        self.time_embedder = TimeEmbedder(4 * channels) if modulated else None
        self.res_blocks = nn.ModuleList(
            ResBlock(channels, padding_mode=padding_mode, causal=causal, modulated=modulated) for _ in range(num_layers)
        )

    def bound(self, time: Tensor) -> list[Layer]:
        """The blocks of a modulated stack, bound to the scaled decode timestep [B]."""
        assert self.time_embedder is not None
        embedding = self.time_embedder(time)
        return [partial(res_block, time_embedding=embedding) for res_block in self.res_blocks]


class Downsample(nn.Module):
    """Space-to-depth down-sampling: folded convolution plus folded input averaged over groups of channels."""

    def __init__(self, config: ResampleConfig, *, padding_mode: PaddingMode):
        super().__init__()
        self.config = config
        folded = config.out_channels // math.prod(config.stride)
        self.conv = TimeConv3d(config.in_channels, folded, padding_mode=padding_mode, causal=True)

    def forward(self, x: Tensor, memory: Memory, last: bool) -> Tensor:
        """Needs 1 + s * k frames in the first piece and s * k in later ones, s being the stride along time."""
        stride = self.config.stride
        if stride[0] == 2 and memory.first(self):
            x = torch.cat((x[:, :, :1], x), dim=2)
        skip = space_to_depth(x, stride).unflatten(1, (self.config.out_channels, -1)).mean(dim=2)
        return space_to_depth(self.conv(x, memory, last), stride).add_(skip)


class Upsample(nn.Module):
    """Depth-to-space up-sampling: unfolded convolution, plus the unfolded input where ``config.residual`` says so."""

    def __init__(self, config: ResampleConfig, *, padding_mode: PaddingMode, causal: bool):
        super().__init__()
        self.config = config
        folded = config.out_channels * math.prod(config.stride)
        self.conv = TimeConv3d(config.in_channels, folded, padding_mode=padding_mode, causal=causal)

    def forward(self, x: Tensor, memory: Memory, last: bool) -> Tensor:
        """T frames become T, or 2T - 1 over the whole clip where time is up-sampled: the first one is dropped."""
        stride = self.config.stride
        y = self.conv(x, memory, last)
        skips = memory.delay(self, x, y.shape[2], last) if self.config.residual else []
        y = _unfolded(y, stride, skips)
        if stride[0] == 2 and y.shape[2] and memory.first(self):
            y = y[:, :, 1:]
        return y


class TimeEmbedder(nn.Module):
    """The decode timestep as a vector: 256 sinusoids (cosines first), two linear layers with SiLU between."""

    def __init__(self, channels: int):
        super().__init__()
        self.timestep_embedder = _TimestepMLP(channels)

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep: [B], already scaled. Returns [B, channels] in the weights' dtype; sinusoids in fp32."""
        exponents = torch.arange(128, device=timestep.device, dtype=torch.float32) / 128
        angles = timestep.float()[:, None] * torch.exp(-math.log(10000) * exponents)
        wave = torch.cat((angles.cos(), angles.sin()), dim=1)
        return self.timestep_embedder(wave)


class _TimestepMLP(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(256, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, wave: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(wave.to(self.linear_1.weight.dtype))))


class PerChannelStatistics(nn.Module):
    """Mean and deviation of every latent channel. Outside the VAE latents are always the normalised ones."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean-of-means", torch.zeros(channels))
        self.register_buffer("std-of-means", torch.ones(channels))

    def normalize(self, x: Tensor) -> Tensor:
        """(x - mean) / std of [B, C, F, H, W], in the dtype of ``x``."""
        mean, std = self._columns(x)
        return (x - mean) / std

    def unnormalize(self, x: Tensor) -> Tensor:
        """x * std + mean of [B, C, F, H, W], in the dtype of ``x``."""
        mean, std = self._columns(x)
        return x * std + mean

    def _columns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # the statistics take the latent's dtype before they are used, as in the released implementation
        mean, std = self.get_buffer("mean-of-means"), self.get_buffer("std-of-means")
        return mean.to(x).view(1, -1, 1, 1, 1), std.to(x).view(1, -1, 1, 1, 1)
