"""Configuration of the diffusion transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..av import AV
from .fields import ConfigError, Section


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """Sizes of one modality's half of the transformer.

    context_dim: width of the text context that enters the text attention.
    max_pos: positions that the rotary tables treat as the end of each axis (seconds, then pixels).
    """

    heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    context_dim: int
    ff_bias: bool
    max_pos: tuple[int, ...]

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Everything that changes the network or its arithmetic; the versions 2.0, 2.3 and 2.5 are values of these fields.

    caption_channels: width entering the in-transformer caption projection, ``None`` when there is none (2.3 on).
    prompt_adaln: the text keys and values are also modulated by the timestep (only with ``cross_attention_adaln``).
    keyframe_marker: learned embedding added to tokens of single-pixel-frame latents (2.5).
    cross_gate_timestep_scale: sigma to timestep for the gates of audio-video attention.
    """

    streams: AV[StreamConfig]
    num_layers: int
    caption_channels: int | None
    gated_attention: bool
    cross_attention_adaln: bool
    prompt_adaln: bool
    keyframe_marker: bool
    norm_eps: float
    rope_theta: float
    rope_double_precision: bool
    timestep_scale: float
    cross_gate_timestep_scale: float

    def __post_init__(self):
        video, audio = self.streams.video, self.streams.audio
        if video.heads != audio.heads:
            raise ConfigError(
                f"video and audio need the same number of attention heads, found {video.heads} and {audio.heads}"
            )

    @property
    def cross_dim(self) -> int:
        """Inner width of both audio-video attentions, which is also the width of their rotary tables."""
        return self.streams.audio.dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """Read the ``transformer`` section of a checkpoint's metadata ``config``.

        Raises ConfigError for a missing key and for a value that this engine does not support.
        """
        section = Section("config", config).section("transformer")
        _check_legal_values(section)
        cross_attention_adaln = section.flag("cross_attention_adaln", False)
        projected_before = section.flag("caption_proj_before_connector", False)
        return cls(
            streams=AV(_video_stream(section), _audio_stream(section)),
            num_layers=section.integer("num_layers", 48, high=512),
            caption_channels=None if projected_before else section.integer("caption_channels"),
            gated_attention=section.flag("apply_gated_attention", False),
            cross_attention_adaln=cross_attention_adaln,
            prompt_adaln=cross_attention_adaln and section.flag("use_prompt_adaln_single", True),
            keyframe_marker=section.flag("use_keyframes_abs_pos_embedding", False),
            norm_eps=section.number("norm_eps", 1e-6),
            rope_theta=section.number("positional_embedding_theta", 10000.0),
            rope_double_precision=section.only("frequencies_precision", "float32", "float64") == "float64",
            timestep_scale=section.number("timestep_scale_multiplier", 1000),
            cross_gate_timestep_scale=section.number("av_ca_timestep_scale_multiplier", 1),
        )


def _video_stream(section: Section) -> StreamConfig:
    return StreamConfig(
        heads=section.integer("num_attention_heads", 32, high=1024),
        head_dim=section.integer("attention_head_dim", 128, high=1024),
        in_channels=section.integer("in_channels", 128),
        out_channels=section.integer("out_channels", 128),
        context_dim=section.integer("cross_attention_dim", 4096),
        ff_bias=section.flag("ff_bias", True),
        max_pos=section.integers("positional_embedding_max_pos", (20, 2048, 2048), length=3),
    )


def _audio_stream(section: Section) -> StreamConfig:
    return StreamConfig(
        heads=section.integer("audio_num_attention_heads", 32, high=1024),
        head_dim=section.integer("audio_attention_head_dim", 64, high=1024),
        in_channels=section.integer("audio_in_channels", 128),
        out_channels=section.integer("audio_out_channels", 128),
        context_dim=section.integer("audio_cross_attention_dim", 2048),
        ff_bias=section.flag("audio_ff_bias", True),
        max_pos=section.integers("audio_positional_embedding_max_pos", (20,), length=1),
    )


# Keys with one legal value: another one means another network.
_ONLY: dict[str, Any] = {
    "dropout": 0.0,
    "attention_bias": True,
    "num_vector_embeds": None,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "upcast_attention": False,
    "standardization_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "positional_embedding_type": "rope",
    "use_audio_video_cross_attention": True,
    "share_ff": False,
    "av_cross_ada_norm": True,
    "use_middle_indices_grid": True,
    "qk_norm": "rms_norm",
    "rope_type": "split",
}


def _check_legal_values(section: Section) -> None:
    for key, value in _ONLY.items():
        section.only(key, value)
    inner = section.integer("audio_num_attention_heads", 32) * section.integer("audio_attention_head_dim", 64)
    if section.integer("audio_cross_attention_dim", 2048) != inner:
        raise ConfigError(
            f"{section.name}.audio_cross_attention_dim is {section.raw('audio_cross_attention_dim', 2048)}; "
            f"it must equal the audio width, {inner}"
        )
