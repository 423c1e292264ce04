"""Configuration of the text path: feature extractor and connectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..av import AV
from .fields import ConfigError, Section

# Where the hidden states are projected; 2.3 and 2.5 carry exactly these values, 2.0 carries none of the keys.
_PROJECTED_PER_MODALITY = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorConfig:
    """Sizes of one connector.

    max_pos: token position that the rotary tables treat as the end of the axis.
    num_registers: learned tokens that fill the places behind the prompt, repeating.
    """

    heads: int
    head_dim: int
    num_layers: int
    max_pos: int
    num_registers: int
    gated: bool
    ff_bias: bool
    rope_theta: float
    double_precision: bool

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """What turns the text encoder's hidden states into contexts; 2.0, 2.3 and 2.5 are values of these fields.

    per_modality_projection: video and audio have a projection each, into their connectors' widths (2.3 on);
        otherwise one projection of width ``feature_dim`` feeds both connectors (2.0).
    feature_dim: width of the text encoder's hidden states.
    """

    connectors: AV[ConnectorConfig]
    per_modality_projection: bool
    feature_dim: int

    def __post_init__(self):
        shared = not self.per_modality_projection
        for name, width in (("video", self.widths.video), ("audio", self.widths.audio)):
            if shared and width != self.feature_dim:
                raise ConfigError(
                    f"the {name} connector is {width} wide, but it shares features of width {self.feature_dim}"
                )

    @property
    def widths(self) -> AV[int]:
        """Last dimension of the contexts, and of the features that enter the connectors."""
        return self.connectors.map(lambda connector: connector.dim)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TextConfig:
        """Read the ``transformer`` section of a checkpoint's metadata ``config``.

        Raises ConfigError for a value that this engine does not support, and for a mixture of the 2.0 and the 2.3
        way of projecting.
        """
        section = Section("config", config).section("transformer")
        section.only("use_embeddings_connector", True)
        section.only("rope_type", "split")
        per_modality = _projects_per_modality(section)
        _check_norm_type(section, per_modality)
        text = cls(
            connectors=AV(_connector(section, ""), _connector(section, "audio_")),
            per_modality_projection=per_modality,
            feature_dim=section.integer("caption_channels", 3840),
        )
        if per_modality:
            _check_width(section, "cross_attention_dim", "video", text.widths.video)
            _check_width(section, "audio_cross_attention_dim", "audio", text.widths.audio)
        return text


def _projects_per_modality(section: Section) -> bool:
    found = {key: section.raw(key) for key in _PROJECTED_PER_MODALITY if section.has(key)}
    if found and found != _PROJECTED_PER_MODALITY:
        raise ConfigError(
            f"{section.name} has {found}; this engine supports all of {_PROJECTED_PER_MODALITY} (2.3, 2.5) "
            "or none of these keys (2.0)"
        )
    return bool(found)


def _check_norm_type(section: Section, per_modality: bool) -> None:
    """The spelling differs: ``per_token_rms`` in 2.3, ``PER_TOKEN_RMS`` in 2.5."""
    if not section.has("text_encoder_norm_type"):
        return
    kind = section.text("text_encoder_norm_type")
    if not per_modality or kind.lower() != "per_token_rms":
        legal = "'per_token_rms'" if per_modality else "no such key beside a shared projection (2.0)"
        raise ConfigError(f"{section.name}.text_encoder_norm_type is {kind!r}; this engine supports {legal}")


def _connector(section: Section, prefix: str) -> ConnectorConfig:
    """Keys ``connector_...``; the audio connector's own ``audio_connector_...`` win over them where they exist."""

    def key(name: str) -> str:
        own = f"{prefix}connector_{name}"
        return own if section.has(own) else f"connector_{name}"

    return ConnectorConfig(
        heads=section.integer(key("num_attention_heads"), 30, high=1024),
        head_dim=section.integer(key("attention_head_dim"), 128, high=1024),
        num_layers=section.integer(key("num_layers"), 2, high=512),
        # ltx-core falls back to [1], which fits no released model
        max_pos=section.integers(key("positional_embedding_max_pos"), (4096,), length=1)[0],
        num_registers=section.integer(key("num_learnable_registers"), 128, high=4096),
        gated=section.flag(key("apply_gated_attention"), False),
        ff_bias=section.flag(key("ff_bias"), True),
        rope_theta=section.number("positional_embedding_theta", 10000.0),
        double_precision=section.only("frequencies_precision", "float32", "float64") == "float64",
    )


def _check_width(section: Section, key: str, stream: str, width: int) -> None:
    if section.has(key) and section.integer(key) != width:
        raise ConfigError(
            f"{section.name}.{key} is {section.raw(key)}, but the {stream} connector's output is {width} wide; "
            "they must be equal where the transformer has no caption projection"
        )
