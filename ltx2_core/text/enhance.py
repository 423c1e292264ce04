"""Prompt enhancement: Gemma 3, which encodes prompts, writes a fuller one first.

The weights are those of the loaded text encoder. Its embeddings are also its output head, so nothing is read or copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .chat import PAD, Turn, user_turn
from .cleaned import cleaned
from .draw import Draw, Randomness
from .encoder_config import GEMMA3, family, version_label
from .instructions import instructions
from .tokenizer import Tokenizer

MAX_NEW_TOKENS = 1024
# instructions, prompt and picture; bounds the memory of the first step
MAX_READ_TOKENS = 4096


class EnhanceError(ValueError):
    """A prompt cannot be enhanced, or nothing came of it."""


@dataclass(frozen=True, eq=False)
class EnhanceRequest:
    """A prompt to be enhanced.

    image: [H, W, 3] in 0..1, the first frame of the clip, or None. seed: equal seeds give equal texts. max_new_tokens: at
    most so many are written. temperature: 0 takes the likeliest words. instructions: what the model is told in place of
    our own; empty for those. topology: how several GPUs share the work, one of ``presets.ENHANCE_TOPOLOGIES``.

    Raises EnhanceError for what is empty or out of range.
    """

    prompt: str
    image: Tensor | None = None
    seed: int = 0
    max_new_tokens: int = 512
    temperature: float = 0.7
    instructions: str = ""
    topology: str = "auto"

    def __post_init__(self) -> None:
        if not self.prompt.strip() and self.image is None:
            raise EnhanceError("there is no prompt to enhance: write what the clip shows, or connect an image")
        if not 1 <= self.max_new_tokens <= MAX_NEW_TOKENS:
            raise EnhanceError(f"max_new_tokens must be 1 to {MAX_NEW_TOKENS}, found {self.max_new_tokens}")
        if not 0 <= self.temperature <= 5:
            raise EnhanceError(f"temperature must be 0 to 5, found {self.temperature}")


def check_writes(config: Mapping[str, Any]) -> None:
    """Raise EnhanceError for a text encoder that cannot write prompts; config: its configuration."""
    if family(config) != GEMMA3:
        raise EnhanceError(
            f"this model's text encoder is {version_label(config)}, which was trained to encode and not to write. Enhance "
            "with the model of LTX-2.0 or 2.3 and its Gemma 3: the text that comes out is for any model"
        )


def enhance(
    text: Any,
    tokenizer: Tokenizer,
    request: EnhanceRequest,
    picture: Tensor | None = None,
    *,
    on_token: Callable[[], None] = lambda: None,
    on_layer: Callable[[], None] = lambda: None,
) -> str:
    """The enhanced prompt, written by a text tower of ``build_gemma`` with its weights.

    picture: tokens of the request's image [N, D] (``VisionEncoder``). on_token: called after every token, on_layer: after
    every layer; both may raise to stop, and the tower is as before whatever happens. Raises EnhanceError where too much is
    to be read, or nothing that can be used was written, and TokenizerError.
    """
    with _polled(text, on_layer):
        return write(writer(text), tokenizer, request, picture, on_token=on_token)


def writer(text: Any) -> Any:
    """The text tower as a model that ``generate`` accepts: the tower itself, and its embeddings as the output head."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    # the class that masks pictures as they need it; its vision tower is replaced, and so is all else without memory
    least = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.device("meta"):
        config = Gemma3Config(text_config=text.config, vision_config=least, image_token_index=PAD)
        model = Gemma3ForConditionalGeneration(config)
    model.model.language_model = text
    model.model.vision_tower, model.model.multi_modal_projector = _Seen(), nn.Identity()
    model.lm_head.weight = text.embed_tokens.weight
    return model.train(False)


class _Seen(nn.Module):
    """A vision tower for pictures that are tokens already."""

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=pixel_values)


def write(
    model: Any,
    tokenizer: Tokenizer,
    request: EnhanceRequest,
    picture: Tensor | None = None,
    *,
    cache: Any = None,
    on_token: Callable[[], None] = lambda: None,
) -> str:
    """What a model of ``writer`` makes of a request. cache: an empty one, for a model that needs its own."""
    from transformers import GenerationConfig

    turn = _turn(tokenizer, request, 0 if picture is None else len(picture))
    embeddings = model.get_input_embeddings().weight
    ids = torch.tensor([turn.ids], device=embeddings.device)
    seen = (
        {} if picture is None else {"pixel_values": picture[None].to(embeddings), "token_type_ids": (ids == PAD).long()}
    )
    draw = Draw(
        Randomness(request.temperature),
        request.seed,
        size=min(tokenizer.size, len(embeddings)),
        never=[token for token in turn.control if token not in turn.stops],
    )
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **seen,
        past_key_values=cache,
        generation_config=GenerationConfig(
            max_new_tokens=request.max_new_tokens, do_sample=False, eos_token_id=list(turn.stops), pad_token_id=PAD
        ),
        logits_processor=[draw],
        stopping_criteria=[_Tell(on_token)],
    )
    answer = written[0, ids.shape[1] :].tolist()
    return _prompt(tokenizer.decode([token for token in answer if token not in turn.control]))


def _turn(tokenizer: Tokenizer, request: EnhanceRequest, picture_tokens: int) -> Turn:
    told = request.instructions.strip() or instructions(with_image=picture_tokens > 0)
    prompt = request.prompt.strip()
    asked = f"The user's idea:\n{prompt}" if prompt else "The user gives the picture alone."
    turn = user_turn(tokenizer, told, asked, picture_tokens)
    if len(turn.ids) > MAX_READ_TOKENS:
        raise EnhanceError(
            f"the prompt has {len(turn.ids)} tokens with what goes with it; at most {MAX_READ_TOKENS} are read. Shorten it, or "
            "the system prompt"
        )
    return turn


def _prompt(text: str) -> str:
    prompt = cleaned(text)
    if not prompt:
        raise EnhanceError(
            "the text encoder wrote nothing that could be a prompt. Try another seed or more max_new_tokens; if that does "
            "not help, it is not an instruction-tuned Gemma 3 (its name has -it), and the prompt is best used as it is"
        )
    return prompt


class _Tell:
    """A stopping criterion of ``generate`` that stops nothing by itself: it is asked once a token."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._on_token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _polled(text: Any, on_layer: Callable[[], None]) -> Iterator[None]:
    hooks = [layer.register_forward_hook(lambda *_: on_layer()) for layer in text.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
