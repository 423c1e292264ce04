"""Tiny random text encoders in every form that users have them, for the demo, tests and benchmarks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.fp8 import pack_fp8
from ...kernels.nvfp4 import pack_nvfp4
from ..loading.write import write_checkpoint
from .encoder_config import tensor_shapes
from .tiny_tokenizer import SPECIAL, VOCABULARY, spiece_model, tokenizer_json

# how single files hold the weights of the linear layers
FORMATS = ("float32", "bfloat16", "fp8", "fp8_old", "fp8_cast", "nvfp4")

GEMMA4_VERSION = "gemma4-12b-ltx-v1"

# transformers' module tree -> names in the files on the hub
_HUB_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
# names in the files on the hub -> in ComfyUI's single files
_SINGLE_PREFIXES = {"language_model.model.": "model.", "vision_tower.vision_model.": "vision_model."}


def write_tiny_gemma(
    folder: Path, *, hidden_size: int = 64, num_layers: int = 6, seed: int = 0, sliding_window: int = 32
) -> None:
    """Write a Gemma 3 folder: ``config.json``, ``model.safetensors`` (float32, hub names, vision included), tokenizer.

    hidden_size: a multiple of 16; num_layers: every sixth layer attends globally. sliding_window: the local ones' reach.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(hidden_size, num_layers, sliding_window)
    _write_json(folder / "config.json", config)
    save_file(_random_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    named = {f"{kind}_token": f"<{kind}>" for kind in ("pad", "eos", "bos", "unk")}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "model_max_length": 131072, **named},
    )


def write_tiny_gemma_file(
    path: Path, *, format: str = "bfloat16", hidden_size: int = 64, num_layers: int = 6, seed: int = 0
) -> None:
    """Write the same Gemma 3 as one file for ComfyUI: no configuration, its tokenizer in the tensor ``spiece_model``.

    Without a configuration the local layers reach 1024 tokens. format: one of ``FORMATS``.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not known; choose {', '.join(FORMATS)}")
    weights = _random_weights(_config(hidden_size, num_layers, 1024), seed)
    tensors: dict[str, Tensor] = (
        {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)} if format == "fp8_old" else {}
    )
    for hub, weight in weights.items():
        name = _renamed(hub, _SINGLE_PREFIXES)
        packed = name.startswith("model.layers.") and weight.dim() == 2
        tensors |= _stored(name, weight, format if packed or format == "float32" else "bfloat16")
    write_checkpoint(path, {**tensors, "spiece_model": _blob(spiece_model())}, {})


def write_tiny_gemma4(
    path: Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 6,
    seed: int = 0,
    projection_widths: tuple[int, int] = (128, 64),
    gemma_version: str | None = GEMMA4_VERSION,
) -> None:
    """Write a Gemma 4 as LTX-2.5's bundled file: configuration, tokenizer and LTX's text projection inside; bfloat16.

    projection_widths: of LTX's video and audio features. gemma_version: None for a file like Google's own.
    """
    config = _gemma4_config(hidden_size, num_layers, gemma_version)
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"model.{name}": _gemma4_values(name, shape, generator) for name, shape in tensor_shapes(config).items()}
    inputs = hidden_size * (num_layers + 1)
    for stream, outputs in zip(("video", "audio"), projection_widths, strict=True):
        layer = f"text_embedding_projection.{stream}_aggregate_embed."
        tensors[layer + "weight"] = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
        tensors[layer + "bias"] = torch.randn(outputs, generator=generator) * 0.05
    tensors["vision_model.pos_norm.weight"] = torch.ones(hidden_size)
    tensors["multi_modal_projector.embedding_projection.weight"] = torch.eye(hidden_size)
    blobs = {
        "tokenizer_json": tokenizer_json(adds_bos=False),
        "hf_asset__tokenizer_config.json": b'{"bos_token": "<bos>"}',
    }
    write_checkpoint(
        path,
        {
            **{name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()},
            **{name: _blob(data) for name, data in blobs.items()},
        },
        {"format": "pt", "gemma_config": json.dumps(config)},
    )


# configurations -------------------------------------------------------------------------------------------------------


def _config(hidden_size: int, num_layers: int, sliding_window: int) -> dict[str, Any]:
    text = {
        "model_type": "gemma3_text",
        **_sizes(hidden_size, num_layers),
        "query_pre_attn_scalar": 16,
        "sliding_window": sliding_window,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "boi_token_index": SPECIAL.index("<start_of_image>"),
        "eoi_token_index": SPECIAL.index("<end_of_image>"),
        "image_token_index": SPECIAL.index("<image_soft_token>"),
        "eos_token_id": [SPECIAL.index("<eos>"), SPECIAL.index("<end_of_turn>")],
    }


def _gemma4_config(hidden_size: int, num_layers: int, gemma_version: str | None) -> dict[str, Any]:
    text = {
        "model_type": "gemma4_unified_text",
        **_sizes(hidden_size, num_layers),
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 32,
        "layer_types": [
            "full_attention" if (i + 1) % 6 == 0 or i + 1 == num_layers else "sliding_attention"
            for i in range(num_layers)
        ],
    }
    version = {} if gemma_version is None else {"gemma_version": gemma_version}
    return {
        "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "model_type": "gemma4_unified",
        **version,
        "text_config": text,
    }


def _sizes(hidden_size: int, num_layers: int) -> dict[str, int]:
    heads = hidden_size // 16
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
    }


# weights --------------------------------------------------------------------------------------------------------------


def _random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Gemma 3's tensors, float32, under the hub's names."""
    from transformers import Gemma3Config
    from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration

    with torch.device("meta"):
        shapes = Gemma3ForConditionalGeneration(Gemma3Config(**config)).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {
        _renamed(name, _HUB_PREFIXES): torch.randn(tensor.shape, generator=generator) * 0.08
        for name, tensor in sorted(shapes.items())
        if name != "lm_head.weight"  # tied to the embeddings
    }


def _gemma4_values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("layer_scalar"):
        return 0.3 + 0.1 * values.tanh()
    if name.endswith(("q_norm.weight", "k_norm.weight")):  # Gemma 4 does not divide attention scores by anything
        return 0.5 + 0.05 * values
    return 1 + 0.1 * values if name.endswith("norm.weight") else 0.08 * values


def _stored(name: str, weight: Tensor, format: str) -> dict[str, Tensor]:
    """A weight as files for ComfyUI hold it in a format."""
    layer = name.removesuffix(".weight")
    if format in ("float32", "bfloat16"):
        return {name: weight.to(getattr(torch, format))}
    if format == "fp8_cast":
        return {name: weight.to(torch.float8_e4m3fn)}
    if format == "nvfp4":
        data, scale, scale_2 = pack_nvfp4(weight)
        parts = {name: data, f"{layer}.weight_scale": scale, f"{layer}.weight_scale_2": scale_2}
        return {**parts, f"{layer}.comfy_quant": _blob(b'{"format": "nvfp4"}')}
    data, scale = pack_fp8(weight, torch.ones(()))
    if format == "fp8_old":
        return {name: data, f"{layer}.scale_weight": scale}
    quant = _blob(b'{"format": "float8_e4m3fn"}')
    return {name: data, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": quant}


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for prefix, other in prefixes.items():
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name


def _blob(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
