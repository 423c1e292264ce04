"""A text encoder's configuration: checked, or told from the shapes of its tensors, and the tensors that it asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import Section

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

GEMMA3, GEMMA4 = "gemma3", "gemma4"
# model_type -> family, and whether the text tower's section is "text_config"
_MODEL_TYPES = {
    "gemma3": (GEMMA3, True),
    "gemma3_text": (GEMMA3, False),
    "gemma4_unified": (GEMMA4, True),
    "gemma4_unified_text": (GEMMA4, False),
}

WHAT_FITS = (
    "LTX-2.0 and 2.3 use Gemma 3 12B (gemma-3-12b-it: its Hugging Face folder, a single file such as "
    "gemma_3_12B_it.safetensors, or a GGUF of it), LTX-2.5 the file gemma4-12b-with-proj-ltx-2.5-*.safetensors"
)

_MAX_JSON_BYTES = 16 * 2**20
_VOCABULARY = {GEMMA3: 262208, GEMMA4: 262144}
_LAYER_NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")

# what no tensor tells, as Gemma 3 12B was released
_GEMMA3_12B: Config = {
    "model_type": "gemma3_text",
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
}


class GemmaError(ValueError):
    """A folder or file is not a text encoder that this engine can use."""


@dataclass(frozen=True)
class _Sizes:
    """What decides the size of the module, within bounds."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def read(cls, section: Section, vocabulary: int) -> _Sizes:
        """vocabulary: the family's own, which configurations leave out as they do the other defaults here."""
        return cls(
            layers=section.integer("num_hidden_layers", high=512),
            width=section.integer("hidden_size", high=65536),
            inner=section.integer("intermediate_size", high=2**20),
            heads=section.integer("num_attention_heads", 8, high=1024),
            kv_heads=section.integer("num_key_value_heads", 4, high=1024),
            head_dim=section.integer("head_dim", 256, high=4096),
            vocabulary=section.integer("vocab_size", vocabulary, high=2**22),
        )


def family(config: Mapping[str, Any]) -> str:
    """``GEMMA3`` or ``GEMMA4``."""
    return _MODEL_TYPES[config["model_type"]][0]


def version_label(config: Mapping[str, Any]) -> str:
    """What a text encoder calls itself: its ``gemma_version``, such as "gemma4-12b-ltx-v1", or else its family."""
    return str(gemma_version(config) or family(config))


def gemma_version(config: Mapping[str, Any]) -> Any:
    """The version that a fine-tuned text encoder states; None for Google's own."""
    return config.get("gemma_version")


def text_section(config: Mapping[str, Any], source: str = "config.json") -> Section:
    """The part of the configuration that describes the text tower."""
    section = Section(source, config)
    return section.section("text_config") if _MODEL_TYPES[config["model_type"]][1] else section


def read_config(path: Path) -> Config:
    """A folder's ``config.json``, checked. Raises GemmaError or ConfigError, saying what was found."""
    return _checked(read_json(path), str(path))


def parse_config(text: str, source: str) -> Config:
    """The configuration in JSON, checked. source: where it stands, for messages."""
    return _checked(_parse_json(text, source), source)


def read_json(path: Path) -> Config:
    """The object in a JSON file of at most 16 MiB. Raises GemmaError."""
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise GemmaError(f"{path} has {size} bytes; at most {_MAX_JSON_BYTES} are read")
    return _parse_json(path.read_bytes(), str(path))


def _parse_json(text: bytes | str, source: str) -> Config:
    if len(text) > _MAX_JSON_BYTES:
        raise GemmaError(f"{source} has {len(text)} characters; at most {_MAX_JSON_BYTES} are read")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GemmaError(f"{source} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise GemmaError(f"{source} must hold a JSON object, found {type(values).__name__}")
    return values


def _checked(config: Config, source: str) -> Config:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _MODEL_TYPES:
        raise GemmaError(
            f"{source} is of model_type {str(kind)[:60]!r}; supported are {', '.join(map(repr, _MODEL_TYPES))}. {WHAT_FITS}"
        )
    _sizes(config, source)
    return config


def gemma3_config(shapes: Mapping[str, tuple[int, ...]], source: str) -> Config:
    """The configuration of a Gemma 3 file that carries none: sizes from its tensors, the rest as 12B was released.

    shapes: by the module's names. source: the file, for messages. Raises GemmaError where a telling tensor is missing.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != dimensions or not all(found):
            what = "missing" if found is None else f"of shape {list(found)}"
            raise GemmaError(f"{source}: tensor {name} of a Gemma 3 text encoder is {what}. {WHAT_FITS}")
        return found

    attention = "layers.0.self_attn."
    vocabulary, width = shape("embed_tokens.weight", 2)
    [head_dim] = shape(attention + "q_norm.weight", 1)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape("layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": _num_layers(shapes),
        "num_attention_heads": shape(attention + "q_proj.weight", 2)[0] // head_dim,
        "num_key_value_heads": shape(attention + "k_proj.weight", 2)[0] // head_dim,
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
    }
    config = {**_GEMMA3_12B, **sizes}
    _sizes(config, source)
    return config


def num_hidden_states(config: Mapping[str, Any]) -> int:
    """How many states the encoder yields: the embeddings and every layer's output."""
    return _sizes(config).layers + 1


def width(config: Mapping[str, Any]) -> int:
    """The width of a hidden state."""
    return _sizes(config).width


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Every parameter and persistent buffer of the text tower by the module's name, with its shape.

    Raises ConfigError for features of the family that the released encoders do not use.
    """
    section, sizes = text_section(config), _sizes(config)
    section.only("attention_bias", False)
    width, inner = sizes.width, sizes.inner
    shapes: Shapes = {"embed_tokens.weight": (sizes.vocabulary, width), "norm.weight": (width,)}
    for i, attention in enumerate(_attentions(config, section, sizes)):
        layer = {
            **{f"self_attn.{name}.weight": shape for name, shape in attention.items()},
            **dict.fromkeys((f"{name}_layernorm.weight" for name in _LAYER_NORMS), (width,)),
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
        }
        if family(config) == GEMMA4:
            layer["layer_scalar"] = (1,)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _attentions(config: Mapping[str, Any], section: Section, sizes: _Sizes) -> list[Shapes]:
    """Per layer, the projections and norms of its attention."""
    local = _attention(sizes, sizes.kv_heads, sizes.head_dim, has_values=True)
    if family(config) == GEMMA3:
        return [local] * sizes.layers
    for key, value in (("num_kv_shared_layers", 0), ("hidden_size_per_layer_input", 0), ("use_double_wide_mlp", False)):
        section.only(key, value)
    kv_heads, shared = sizes.kv_heads, section.flag("attention_k_eq_v", False)
    if shared and section.raw("num_global_key_value_heads", None) is not None:
        kv_heads = section.integer("num_global_key_value_heads", high=1024)
    # where values are shared they are another norm of the keys' projection
    wide = _attention(sizes, kv_heads, section.integer("global_head_dim", 512, high=4096), has_values=not shared)
    return [local if kind == "sliding_attention" else wide for kind in _layer_types(section, sizes.layers)]


def _attention(sizes: _Sizes, kv_heads: int, head_dim: int, *, has_values: bool) -> Shapes:
    keys = (kv_heads * head_dim, sizes.width)
    return {
        "q_proj": (sizes.heads * head_dim, sizes.width),
        "k_proj": keys,
        **({"v_proj": keys} if has_values else {}),
        "o_proj": (sizes.width, sizes.heads * head_dim),
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
    }


def _layer_types(section: Section, layers: int) -> list[str]:
    """The attention of every layer; without a list every sixth is full, and the last always is."""
    kinds = section.raw("layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    known = isinstance(kinds, list) and all(kind in ("sliding_attention", "full_attention") for kind in kinds)
    if not known or len(kinds) != layers:
        raise GemmaError(
            f"{section.name}.layer_types must name sliding_attention or full_attention for each of {layers} layers"
        )
    return [*kinds[:-1], "full_attention"]


def _num_layers(shapes: Mapping[str, Any]) -> int:
    """One more than the highest number of a layer; holes are found when tensors are compared."""
    numbers = [name.split(".")[1] for name in shapes if name.startswith("layers.")]
    return 1 + max((int(n) for n in numbers if n.isascii() and n.isdigit() and len(n) <= 4), default=-1)


def _sizes(config: Mapping[str, Any], source: str = "config.json") -> _Sizes:
    return _Sizes.read(text_section(config, source), _VOCABULARY[family(config)])
