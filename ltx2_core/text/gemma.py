"""Gemma 3, the text encoder: its files, its text tower through transformers, and all its hidden states."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.fields import Section

_MAX_JSON_BYTES = 16 * 2**20
_MODEL_TYPES = ("gemma3", "gemma3_text")
# A text tensor's prefix: hub files, transformers' own module tree, single files for ComfyUI
_TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "model.")
_TEXT_PARTS = ("embed_tokens.", "layers.", "norm.")
# Keys of a config.json that choose code rather than sizes
_IMPLEMENTATION_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "auto_map", "dtype")


class GemmaError(ValueError):
    """A folder does not hold a text encoder that this engine can use."""


def read_gemma_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a Gemma 3 folder. Raises GemmaError for anything else, saying what was found."""
    path = folder / "config.json"
    if not path.is_file():
        raise GemmaError(f"{folder} has no config.json; choose the folder of a Gemma 3 text encoder (gemma-3-12b-it)")
    config = _read_json(path)
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise GemmaError(
            f"{path} is of model_type {kind!r}; supported are {' and '.join(map(repr, _MODEL_TYPES))}, "
            "the text encoder of LTX-2.0 and 2.3 (gemma-3-12b-it)"
        )
    _check_sizes(_text_section(config))
    return config


def num_hidden_states(config: Mapping[str, Any]) -> int:
    """How many states the encoder yields: the embeddings and every layer's output."""
    return _text_section(config).integer("num_hidden_layers") + 1


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the shards that an index lists, else every file beside ``config.json``.

    Raises GemmaError when there are none, and for an index that lists missing files or files elsewhere.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _indexed_files(folder, indices[0])
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        raise GemmaError(f"{folder} has no .safetensors file; other weight formats are not read")
    return files


def build_gemma(config: Mapping[str, Any]) -> nn.Module:
    """A ``transformers`` Gemma3TextModel; under ``torch.device("meta")`` it takes no memory.

    config: as ``read_gemma_config`` returns it.
    """
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

    values = {key: value for key, value in _text_section(config).values.items() if key not in _IMPLEMENTATION_KEYS}
    text_config = Gemma3TextConfig(**{**values, "attn_implementation": "sdpa"})
    return Gemma3TextModel(text_config).train(False).requires_grad_(False)


def module_name(checkpoint_name: str) -> str | None:
    """The name in ``build_gemma``'s module; None for tensors that encoding does not need (vision, projector, lm_head)."""
    for prefix in _TEXT_PREFIXES:
        name = checkpoint_name.removeprefix(prefix)
        if name != checkpoint_name and name.startswith(_TEXT_PARTS):
            return name
    return None


def assign(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Make tensors, by ``module_name``'s names, the model's parameters as they are, without a copy.

    source: where they come from, for messages. Raises GemmaError, naming tensors, unless they fit one to one.
    """
    slots = model.state_dict()
    wrong = [f"{name}: missing, needs {tuple(slots[name].shape)}" for name in slots.keys() - state.keys()]
    for name, tensor in state.items():
        if name not in slots:
            wrong.append(f"{name}: unexpected, {tensor.dtype} {tuple(tensor.shape)}")
        elif tensor.shape != slots[name].shape or not tensor.is_floating_point():
            wrong.append(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, needs floats {tuple(slots[name].shape)}")
    if wrong:
        listed = "; ".join(sorted(wrong)[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise GemmaError(
            f"{source} does not hold the weights that its config.json describes, as plain floating-point tensors "
            f"(quantised text encoders are not read): {listed}"
        )
    model.load_state_dict(dict(state), strict=True, assign=True)
    model.requires_grad_(False)


def fill_buffers(model: Any, device: torch.device) -> None:
    """Give a model that was built on the meta device its computed buffers: rotary frequencies and embedding scale.

    They are float32 whatever the weights are: bfloat16 frequencies ruin the rotary embedding.
    Raises GemmaError when a buffer is left without a value.
    """
    rotary = model.rotary_emb
    with torch.device("cpu"):
        computed = type(rotary)(config=model.config)
        scale = torch.tensor(model.config.hidden_size**0.5, dtype=torch.float32)
    for name, buffer in computed.named_buffers():
        rotary.register_buffer(name, buffer.to(device), persistent=False)
    model.embed_tokens.register_buffer("embed_scale", scale.to(device), persistent=False)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise GemmaError(f"this version of transformers has buffers that the engine cannot compute: {', '.join(left)}")


def hidden_states(
    model: Any,
    ids: list[int],
    *,
    pad_to: int | None = None,
    on_layer: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode one prompt.

    ids: token ids without padding; pad_to: left-pad to this length, which only changes the rounding (the reference
    pads to 1024); on_layer: called after every layer, may raise to stop.
    Returns the states [1, S, D, L] in the weights' dtype and the mask [1, S], True at tokens. State 0 is the scaled
    embedding, the last one the final norm's output. States at padding are meaningless.
    """
    vocabulary = model.config.vocab_size
    if not ids or max(ids) >= vocabulary or min(ids) < 0:
        raise GemmaError(f"token ids must be in 0..{vocabulary - 1}; does the tokenizer belong to this text encoder?")
    padding = max((pad_to or 0) - len(ids), 0)
    device = model.embed_tokens.weight.device
    mask = torch.tensor([[False] * padding + [True] * len(ids)], device=device)
    tokens = torch.tensor([[0] * padding + ids], device=device)
    hooks = [layer.register_forward_hook(lambda *_: on_layer()) for layer in model.layers if on_layer is not None]
    try:
        output = model(
            input_ids=tokens,
            attention_mask=mask.long() if padding else None,
            output_hidden_states=True,
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(output.hidden_states, dim=-1), mask


def _text_section(config: Mapping[str, Any]) -> Section:
    section = Section("config.json", config)
    return section.section("text_config") if config.get("model_type") == "gemma3" else section


def _check_sizes(section: Section) -> None:
    """Bound what decides the size of the module before anything is built."""
    section.integer("num_hidden_layers", high=512)
    section.integer("hidden_size", high=65536)
    section.integer("intermediate_size", high=2**20)
    section.integer("num_attention_heads", 8, high=1024)
    section.integer("num_key_value_heads", 4, high=1024)
    section.integer("head_dim", 256, high=4096)
    section.integer("vocab_size", 262208, high=2**22)


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GemmaError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    odd = [name for name in names if Path(name).name != name or "\\" in name or not name.endswith(".safetensors")]
    if odd:
        raise GemmaError(f"{index} lists {odd[0]!r}; only .safetensors files of the same folder are read")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise GemmaError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists; download it again")
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise GemmaError(f"{path} has {size} bytes; at most {_MAX_JSON_BYTES} are read")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise GemmaError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise GemmaError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values
