"""Prompt enhancement with a model's own text encoder, on one device."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from .component import Component
from .components import vision_component
from .host import host
from .memory_sizes import size
from .model_files import ModelFiles
from .phases import phase
from .text.enhance import EnhanceRequest, check_writes, enhance
from .text.tokenizer import Tokenizer

log = logging.getLogger("ltx2.engine")

# the first step over at most 4096 tokens, and the keys and values of a few thousand
WORK_BYTES = 2 << 30


def enhance_prompt(
    files: ModelFiles, encoder: Component[Any], tokenizer: Tokenizer, request: EnhanceRequest, dtype: torch.dtype
) -> str:
    """A fuller prompt, written by the text encoder, with progress for every token.

    dtype: of the vision tower, which is read where the request has an image. Raises EnhanceError or TokenizerError, and
    GemmaError where the text encoder's files cannot see pictures.
    """
    check_writes(files.text_encoder.config)
    device = torch.device(files.spec.device)
    with phase("prompt enhancement", device), torch.no_grad():
        picture = None if request.image is None else see(files, request.image, dtype)
        text = encoder.use(WORK_BYTES)
        _warn_of_streaming(encoder)
        with host().progress(request.max_new_tokens, "enhancing the prompt") as progress:
            check = host().check_interrupt
            prompt = enhance(text, tokenizer, request, picture, on_token=progress.step, on_layer=check)
    log.info("the enhanced prompt: %s", prompt)
    return prompt


def see(files: ModelFiles, image: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens of a picture [H, W, 3] as the text encoder sees it, [N, D] on its device.

    What sees is small and rarely needed, so it is read for it and not kept. Raises GemmaError where the files lack it.
    """
    component = vision_component(files, dtype)
    try:
        return component.use(WORK_BYTES)(image)
    finally:
        component.close()


def _warn_of_streaming(encoder: Component[Any]) -> None:
    streamed = encoder.full_bytes - encoder.bytes_on(encoder.device)
    if streamed > 0:
        log.warning(
            "the text encoder does not fit on %s: %s of it are copied there again for every token, so this takes minutes. A "
            "text encoder in fp8 or a GGUF takes less",
            encoder.device,
            size(streamed),
        )
