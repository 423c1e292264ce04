"""Gemma, the text encoder: its text tower through transformers, and all its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .encoder_config import GEMMA3, GemmaError, family, text_section

_GEMMA4_SINCE = "5.10.1"
# Keys of a configuration that choose code rather than sizes
_IMPLEMENTATION_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "auto_map", "dtype")


def build_gemma(config: Mapping[str, Any]) -> nn.Module:
    """The text tower that a configuration describes, of transformers; under ``torch.device("meta")`` it takes no memory.

    Raises GemmaError when the installed transformers lacks the family or does not take the configuration.
    """
    section = text_section(config)
    values = {key: value for key, value in section.values.items() if key not in _IMPLEMENTATION_KEYS}
    config_class, model_class = _gemma3_classes() if family(config) == GEMMA3 else _gemma4_classes()
    try:
        model = model_class(config_class(**{**values, "attn_implementation": "sdpa"}))
    # the library's own checks of a configuration raise errors of many kinds
    except Exception as error:
        raise GemmaError(
            f"transformers does not take {section.name} of the text encoder: {str(error)[:300]}"
        ) from error
    return model.train(False).requires_grad_(False)


def _gemma3_classes() -> tuple[Any, Any]:
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

    return Gemma3TextConfig, Gemma3TextModel


def _gemma4_classes() -> tuple[Any, Any]:
    try:
        from transformers import Gemma4UnifiedTextConfig
        from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedTextModel
    except ImportError as error:
        from transformers import __version__ as installed

        raise GemmaError(
            f"the text encoder is Gemma 4, which needs transformers {_GEMMA4_SINCE} or newer; {installed} is installed. "
            'Update it: pip install -U "transformers>=' + _GEMMA4_SINCE + '"'
        ) from error
    return Gemma4UnifiedTextConfig, Gemma4UnifiedTextModel


def fill_buffers(model: Any, device: torch.device) -> None:
    """Give a model that was built on the meta device its computed buffers: rotary frequencies and embedding scale.

    They are float32 whatever the weights are: bfloat16 frequencies ruin the rotary embedding. Buffers that a file holds
    are left alone. Raises GemmaError when a computed one is left without a value.
    """
    rotary = model.rotary_emb
    with torch.device("cpu"):
        computed = type(rotary)(config=model.config)
        scale = torch.tensor(model.config.hidden_size**0.5, dtype=torch.float32)
    for name, buffer in computed.named_buffers():
        rotary.register_buffer(name, buffer.to(device), persistent=False)
    model.embed_tokens.register_buffer("embed_scale", scale.to(device), persistent=False)
    held = model.state_dict().keys()
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in held]
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
    device = model.norm.weight.device
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
