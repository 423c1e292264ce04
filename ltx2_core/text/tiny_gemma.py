"""A tiny random Gemma 3 on disk, for tests and benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# The first ids are Gemma's own; the byte alphabet follows them.
_SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
)
_IMAGE_TOKEN = "<image_soft_token>"
_VOCABULARY = 320

# transformers' module tree -> names in the files on the hub
_HUB_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def write_tiny_gemma(folder: Path, *, hidden_size: int = 64, num_layers: int = 6, seed: int = 0) -> None:
    """Write ``config.json``, ``model.safetensors`` (float32, hub names, vision included) and a byte-level tokenizer.

    hidden_size: a multiple of 16; num_layers: every sixth layer attends globally. The local window is 32 tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(hidden_size, num_layers)
    _write_json(folder / "config.json", config)
    save_file(_random_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)


def _config(hidden_size: int, num_layers: int) -> dict[str, Any]:
    heads = hidden_size // 16
    text = {
        "model_type": "gemma3_text",
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 32,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "vocab_size": _VOCABULARY,
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
        "boi_token_index": _SPECIAL.index("<start_of_image>"),
        "eoi_token_index": _SPECIAL.index("<end_of_image>"),
        "image_token_index": len(_SPECIAL),
        "eos_token_id": [_SPECIAL.index("<eos>"), _SPECIAL.index("<end_of_turn>")],
    }


def _random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    from transformers import Gemma3Config
    from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration

    with torch.device("meta"):
        shapes = Gemma3ForConditionalGeneration(Gemma3Config(**config)).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {
        _hub_name(name): torch.randn(tensor.shape, generator=generator) * 0.08
        for name, tensor in sorted(shapes.items())
        if name != "lm_head.weight"  # tied to the embeddings
    }


def _hub_name(name: str) -> str:
    for prefix, hub in _HUB_PREFIXES.items():
        if name.startswith(prefix):
            return hub + name.removeprefix(prefix)
    raise AssertionError(f"unknown tensor {name}")


def _write_tokenizer(folder: Path) -> None:
    """Byte-level, so any text can be encoded; adds the BOS, as Gemma 3's tokenizer does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = (*_SPECIAL, _IMAGE_TOKEN, *alphabet)
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", _SPECIAL.index("<bos>"))]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*_SPECIAL, _IMAGE_TOKEN)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{kind}_token": f"<{kind}>" for kind in ("pad", "eos", "bos", "unk")}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "model_max_length": 131072, **named},
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
