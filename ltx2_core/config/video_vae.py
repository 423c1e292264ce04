"""Configuration of the convolutional video VAE, read from the `vae` section of a checkpoint's metadata."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from .fields import ConfigError, Section

_LOG = logging.getLogger("ltx2.vae")

PaddingMode = Literal["zeros", "reflect"]
_PADDING_MODES = ("zeros", "reflect")
_STRIDES = {"compress_space": (1, 2, 2), "compress_time": (2, 1, 1), "compress_all": (2, 2, 2)}
_ENCODER_BLOCKS = ("res_x", *(f"{name}_res" for name in _STRIDES))
_DECODER_BLOCKS = ("res_x", *_STRIDES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResStackConfig:
    """A run of residual blocks of one width."""

    channels: int
    num_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResampleConfig:
    """A down-sampler (encoder) or up-sampler (decoder); ``stride`` is (time, height, width)."""

    in_channels: int
    out_channels: int
    stride: tuple[int, int, int]
    residual: bool


BlockConfig = ResStackConfig | ResampleConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoEncoderConfig:
    """The causal encoder; ``blocks`` stand in the order in which they run."""

    in_channels: int
    latent_channels: int
    patch_size: int
    base_channels: int
    padding_mode: PaddingMode
    blocks: tuple[BlockConfig, ...]

    @property
    def out_channels(self) -> int:
        """Width of the last convolution: the means and one shared log-variance, which is not used."""
        return self.latent_channels + 1

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along height and along width."""
        return self.patch_size * prod(stride[1] for stride in _strides(self.blocks))

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame, the first latent frame apart (it holds one)."""
        return prod(stride[0] for stride in _strides(self.blocks))

    @staticmethod
    def from_section(section: Section) -> VideoEncoderConfig:
        """Read the encoder's half of a flat `vae` section."""
        latent_channels = section.integer("latent_channels", 128, high=4096)
        base_channels = section.integer("encoder_base_channels", latent_channels, high=4096)
        # an absent mode means zeros here and reflect in the decoder; a present one governs both halves
        fallback = section.only("encoder_spatial_padding_mode", *_PADDING_MODES)
        section.only("latent_log_var", "uniform", "constant")
        return VideoEncoderConfig(
            in_channels=section.integer("in_channels", 3, high=64),
            latent_channels=latent_channels,
            patch_size=section.integer("patch_size", 4, high=16),
            base_channels=base_channels,
            padding_mode=section.only("spatial_padding_mode", *_PADDING_MODES, default=fallback),
            blocks=_encoder_blocks(section, base_channels),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoDecoderConfig:
    """The convolutional decoder; ``blocks`` stand in the order in which they run (the file lists them reversed)."""

    latent_channels: int
    out_channels: int
    patch_size: int
    bottleneck_channels: int
    padding_mode: PaddingMode
    causal: bool
    timestep_conditioning: bool
    blocks: tuple[BlockConfig, ...]

    @property
    def last_channels(self) -> int:
        """Width of the finest stage."""
        last = self.blocks[-1]
        return last.channels if isinstance(last, ResStackConfig) else last.out_channels

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along height and along width."""
        return self.patch_size * prod(stride[1] for stride in _strides(self.blocks))

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame, the first latent frame apart (it gives one)."""
        return prod(stride[0] for stride in _strides(self.blocks))

    @staticmethod
    def from_section(section: Section, *, timestep_conditioning: bool | None = None) -> VideoDecoderConfig:
        """Read the decoder's half of a flat `vae` section; ``timestep_conditioning`` as in ``VideoVAEConfig``."""
        base_channels = section.integer("decoder_base_channels", 128, high=4096)
        bottleneck_channels, blocks = _decoder_blocks(section, base_channels)
        return VideoDecoderConfig(
            latent_channels=section.integer("latent_channels", 128, high=4096),
            out_channels=section.integer("out_channels", 3, high=64),
            patch_size=section.integer("patch_size", 4, high=16),
            bottleneck_channels=bottleneck_channels,
            padding_mode=section.only("spatial_padding_mode", *_PADDING_MODES, default="reflect"),
            causal=section.flag("causal_decoder", False),
            timestep_conditioning=_timestep_conditioning(section, timestep_conditioning),
            blocks=blocks,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoVAEConfig:
    """Both halves of the convolutional video VAE (LTX-2.0, 2.3 and the convolutional file of 2.5)."""

    encoder: VideoEncoderConfig
    decoder: VideoDecoderConfig

    @property
    def latent_channels(self) -> int:
        return self.encoder.latent_channels

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along height and along width: 32 in every release."""
        return self.encoder.spatial_factor

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first: 8 in every release."""
        return self.encoder.temporal_factor

    @staticmethod
    def from_config(config: Mapping[str, Any], *, timestep_conditioning: bool | None = None) -> VideoVAEConfig:
        """Read the `vae` section of a checkpoint's metadata configuration.

        config: the whole JSON object.
        timestep_conditioning: whether the file holds the tensors of a timestep-conditioned decoder; wins over the
            flag of the same name, since the implementations disagree about that flag's default. None: use the flag.
        Raises ConfigError for a diffusion decoder and for any block, norm or size that is not supported.
        """
        section = Section("config", config).section("vae")
        kind = section.raw("_class_name", "CausalVideoAutoencoder")
        if kind != "CausalVideoAutoencoder":
            raise ConfigError(
                f"{section.name}._class_name is {kind!r}; the convolutional VAE reads 'CausalVideoAutoencoder' only "
                "('CausalDiffusionVAE' is the 2.5 diffusion decoder, which has a configuration of its own)"
            )
        section.only("dims", 3)
        section.only("norm_layer", "pixel_norm")
        section.only("use_quant_conv", False)
        vae = VideoVAEConfig(
            encoder=VideoEncoderConfig.from_section(section),
            decoder=VideoDecoderConfig.from_section(section, timestep_conditioning=timestep_conditioning),
        )
        for factor in ("spatial_factor", "temporal_factor"):
            down, up = getattr(vae.encoder, factor), getattr(vae.decoder, factor)
            if down != up:
                raise ConfigError(
                    f"{section.name}: the encoder's {factor} is {down} and the decoder's {up}; they must agree"
                )
        return vae


def _strides(blocks: tuple[BlockConfig, ...]) -> list[tuple[int, int, int]]:
    return [block.stride for block in blocks if isinstance(block, ResampleConfig)]


def _timestep_conditioning(section: Section, found: bool | None) -> bool:
    if found is None:
        return section.flag("timestep_conditioning", False)
    if section.has("timestep_conditioning") and section.flag("timestep_conditioning") != found:
        _LOG.warning(
            "%s.timestep_conditioning is %s but the file %s the tensors of a timestep-conditioned decoder; "
            "going by the tensors",
            section.name,
            not found,
            "has" if found else "lacks",
        )
    return found


def _entries(section: Section, key: str, names: tuple[str, ...]) -> list[tuple[str, Section]]:
    """The block list ``key`` as (name, parameters), in the file's order."""
    entries = section.raw(key)
    if not isinstance(entries, list | tuple) or not 1 <= len(entries) <= 64:
        raise ConfigError(f"{section.name}.{key} must be a list of 1 to 64 blocks, found {entries!r}")
    blocks = []
    for index, entry in enumerate(entries):
        where = f"{section.name}.{key}[{index}]"
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise ConfigError(f"{where} must be [name, parameters], found {entry!r}")
        name, params = entry
        if name not in names:
            raise ConfigError(f"{where} is a block named {name!r}; this engine supports {', '.join(names)}")
        blocks.append((name, Section(where, params if isinstance(params, Mapping) else {"num_layers": params})))
    return blocks


def _res_stack(params: Section, channels: int) -> ResStackConfig:
    params.only("inject_noise", False)
    return ResStackConfig(channels=channels, num_layers=params.integer("num_layers", high=64))


def _encoder_blocks(section: Section, channels: int) -> tuple[BlockConfig, ...]:
    blocks: list[BlockConfig] = []
    for name, params in _entries(section, "encoder_blocks", _ENCODER_BLOCKS):
        if name == "res_x":
            blocks.append(_res_stack(params, channels))
            continue
        stride, multiplier = _STRIDES[name.removesuffix("_res")], params.integer("multiplier", high=8)
        wider = channels * multiplier
        if prod(stride) % multiplier or wider % prod(stride):
            raise ConfigError(
                f"{params.name}: {name} from {channels} channels with multiplier {multiplier} does not come out even; "
                f"the multiplier must divide {prod(stride)}, and {prod(stride)} must divide {wider}"
            )
        blocks.append(ResampleConfig(in_channels=channels, out_channels=wider, stride=stride, residual=True))
        channels = wider
    return tuple(blocks)


def _decoder_blocks(section: Section, base_channels: int) -> tuple[int, tuple[BlockConfig, ...]]:
    """The bottleneck's width and the blocks, coarsest first."""
    entries = _entries(section, "decoder_blocks", _DECODER_BLOCKS)[::-1]
    multipliers = [params.integer("multiplier", high=8) for name, params in entries if name != "res_x"]
    bottleneck = channels = base_channels * prod(multipliers)
    blocks: list[BlockConfig] = []
    for name, params in entries:
        if name == "res_x":
            blocks.append(_res_stack(params, channels))
            continue
        stride, multiplier = _STRIDES[name], params.integer("multiplier")
        residual = params.flag("residual", False)
        if residual and name != "compress_all":
            raise ConfigError(f"{params.name}: residual is supported for compress_all only, found in {name}")
        narrower = channels // multiplier
        if residual and (channels % prod(stride) or prod(stride) % multiplier):
            raise ConfigError(
                f"{params.name}: residual {name} of {channels} channels with multiplier {multiplier} does not come "
                f"out even; the multiplier must divide {prod(stride)}, and {prod(stride)} must divide {channels}"
            )
        blocks.append(ResampleConfig(in_channels=channels, out_channels=narrower, stride=stride, residual=residual))
        channels = narrower
    return bottleneck, tuple(blocks)
