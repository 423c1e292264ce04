"""The convolutional video decoder of LTX-2: normalised latents to pixels, whole or streamed along time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ...kernels import pixel_norm_silu
from ..config.video_vae import ResStackConfig, VideoDecoderConfig
from ..parallel.bands import WHOLE, Bands
from .layers import (
    PerChannelStatistics,
    ResStack,
    TimeConv3d,
    TimeEmbedder,
    Upsample,
    Write,
    modulation_rows,
    unpatchify,
)
from .video_memory import decoder_costs
from .video_streaming import Layer, Memory, Step, flow

DEFAULT_CHUNK_FRAMES = 8
DECODE_TIMESTEP = 0.05
DECODE_NOISE_SCALE = 0.025
DECODE_NOISE_SEED = 42

Noise = Tensor | torch.Generator | None


class HasDecoderConfig(Protocol):
    """A VAE configuration whose decoder is the convolutional one."""

    @property
    def decoder(self) -> VideoDecoderConfig: ...


class VideoDecoder(nn.Module):
    """Checkpoint names `vae.decoder.X` are this module's `X`; `vae.per_channel_statistics.X` keep their name."""

    def __init__(self, config: HasDecoderConfig):
        super().__init__()
        self.config = cfg = config.decoder
        mode, causal, modulated = cfg.padding_mode, cfg.causal, cfg.timestep_conditioning
        self.conv_in = TimeConv3d(cfg.latent_channels, cfg.bottleneck_channels, padding_mode=mode, causal=causal)
        self.up_blocks = nn.ModuleList(
            ResStack(block.channels, block.num_layers, padding_mode=mode, causal=causal, modulated=modulated)
            if isinstance(block, ResStackConfig)
            else Upsample(block, padding_mode=mode, causal=causal)
            for block in cfg.blocks
        )
        out_channels = cfg.out_channels * cfg.patch_size**2
        self.conv_out = TimeConv3d(cfg.last_channels, out_channels, padding_mode=mode, causal=causal)
        self.per_channel_statistics = PerChannelStatistics(cfg.latent_channels)
        if modulated:
            self.timestep_scale_multiplier = nn.Parameter(torch.ones(()))
            self.last_time_embedder = TimeEmbedder(2 * cfg.last_channels)
            # rows: shift, scale
            self.last_scale_shift_table = nn.Parameter(torch.zeros(2, cfg.last_channels))

    def forward(self, latents: Tensor, *, decode_timestep: float = DECODE_TIMESTEP, noise: Noise = None) -> Tensor:
        """Decode a clip.

        latents: normalised [B, C, F, H, W].
        decode_timestep, noise: used by a timestep-conditioned decoder only, which mixes 2.5 % noise into the latents.
            noise is a tensor shaped like ``latents`` or a generator; None draws from a generator with seed 42. Other
            decoders leave a generator untouched and refuse a tensor.
        Returns pixels [B, 3, 8 * (F - 1) + 1, 32 * H, 32 * W], nominally in [-1, 1], in the weights' dtype.
        Raises ValueError for latents or noise that do not fit.
        """
        frames = self.stream(latents, None, decode_timestep=decode_timestep, noise=noise)
        return torch.cat(list(frames), dim=2)

    def stream(
        self,
        latents: Tensor,
        chunk_frames: int | None = DEFAULT_CHUNK_FRAMES,
        *,
        decode_timestep: float = DECODE_TIMESTEP,
        noise: Noise = None,
        bands: Bands = WHOLE,
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[Tensor]:
        """Decode as ``forward`` does; yield [B, 3, f, H, W] in order of time, f varying.

        chunk_frames: how many frames of the finest stage are in work at once; None: the whole clip.
        bands: of the picture's rows on the ranks that decode it together, from the same latents and noise: of all rows,
            which this one takes its own of. It yields those.
        check: called before every layer, and at the same places on all ranks; may raise to stop, on all of them.
        """
        # noise is drawn for the whole picture, so it does not depend on the ranks
        z = bands.take(self.prepare(latents, noise))
        yield from flow(self.steps(decode_timestep), z, Memory(bands), True, chunk_frames, check)

    def prepare(self, latents: Tensor, noise: Noise = None) -> Tensor:
        """Check latents, convert them to the weights' device and dtype, mix in noise, and undo the normalisation."""
        self._check(latents)
        weight = self.conv_in.conv.weight
        z = latents.to(weight.device, weight.dtype)
        if self.config.timestep_conditioning:
            z = _noise_like(z, noise) * DECODE_NOISE_SCALE + (1.0 - DECODE_NOISE_SCALE) * z
        elif isinstance(noise, Tensor):
            raise ValueError("this video VAE has no timestep conditioning, so its decoder takes no noise")
        return self.per_channel_statistics.unnormalize(z)

    def steps(self, decode_timestep: float = DECODE_TIMESTEP) -> list[Step]:
        """The layers for ``flow``, from prepared latents to pixels, bound to one decode timestep."""
        layers: list[Layer] = [self.conv_in]
        tail_write: Write = pixel_norm_silu
        if self.config.timestep_conditioning:
            time = self._time(decode_timestep)
            for block in self.up_blocks:
                layers.extend(block.bound(time) if isinstance(block, ResStack) else [block])
            shift, scale = modulation_rows(self.last_scale_shift_table, self.last_time_embedder(time))
            tail_write = partial(pixel_norm_silu, modulation=(shift, scale))
        else:
            for block in self.up_blocks:
                layers.extend(block.res_blocks if isinstance(block, ResStack) else [block])
        layers.append(partial(self._tail, write=tail_write))
        costs = decoder_costs(self.config)
        finest = costs[-1].inputs
        return [Step(layer, max(cost.inputs, cost.outputs) / finest) for layer, cost in zip(layers, costs, strict=True)]

    def _time(self, decode_timestep: float) -> Tensor:
        multiplier = self.timestep_scale_multiplier
        return torch.full((1,), decode_timestep, dtype=multiplier.dtype, device=multiplier.device) * multiplier

    def _tail(self, x: Tensor, memory: Memory, last: bool, write: Write) -> Tensor:
        return unpatchify(self.conv_out(x, memory, last, write), self.config.patch_size)

    def _check(self, latents: Tensor) -> None:
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise ValueError(
                f"video latents must be [batch, {channels}, frames, height, width] and not empty, "
                f"got {tuple(latents.shape)}"
            )
        height, width = latents.shape[3:]
        if self.config.padding_mode == "reflect" and min(height, width) < 2:
            factor = self.config.spatial_factor
            raise ValueError(
                f"{width}x{height} latents ({width * factor}x{height * factor} pixels) are too small: this decoder "
                f"mirrors at the border and needs 2 rows and 2 columns, {2 * factor}x{2 * factor} pixels, or more"
            )


def _noise_like(z: Tensor, noise: Noise) -> Tensor:
    if noise is None:
        noise = torch.Generator().manual_seed(DECODE_NOISE_SEED)
    if isinstance(noise, torch.Generator):
        noise = torch.randn(z.shape, generator=noise, dtype=z.dtype, device=noise.device)
    if noise.shape != z.shape:
        raise ValueError(f"decode noise must have the latents' shape {tuple(z.shape)}, got {tuple(noise.shape)}")
    return noise.to(z)
