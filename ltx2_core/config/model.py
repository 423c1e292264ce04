"""The configurations of all networks of one model, from one checkpoint's metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .audio import AudioVAEConfig, VocoderConfig
from .fields import ConfigError
from .text import TextConfig
from .transformer import TransformerConfig
from .video_vae import VideoVAEConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model. num_hidden_states: how many states the text encoder yields, its layers and one."""

    transformer: TransformerConfig
    video_vae: VideoVAEConfig
    audio_vae: AudioVAEConfig
    vocoder: VocoderConfig
    text: TextConfig
    num_hidden_states: int

    def __post_init__(self):
        streams = self.transformer.streams
        for stream, width, source, found in (
            ("video", streams.video.in_channels, "video VAE", self.video_vae.latent_channels),
            ("audio", streams.audio.in_channels, "audio VAE", self.audio_vae.token_width),
        ):
            if width != found:
                raise ConfigError(
                    f"the transformer's {stream} tokens are {width} wide, but the {source} makes {found} channels: "
                    "they belong to different models"
                )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_hidden_states: int, tensor_names: Iterable[str]) -> ModelConfig:
        """Read all sections of a checkpoint's ``config``; ``tensor_names`` decide what the config leaves open."""
        timestep_conditioning = any(name.endswith("decoder.timestep_scale_multiplier") for name in tensor_names)
        return cls(
            transformer=TransformerConfig.from_config(config),
            video_vae=VideoVAEConfig.from_config(config, timestep_conditioning=timestep_conditioning),
            audio_vae=AudioVAEConfig.from_config(config),
            vocoder=VocoderConfig.from_config(config),
            text=TextConfig.from_config(config),
            num_hidden_states=num_hidden_states,
        )
