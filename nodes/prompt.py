"""Encoding prompts."""

from __future__ import annotations

from . import links
from .fields import LINK, STRING


class LTX2EncodePrompt:
    """Encodes one prompt for video and sound. Use one node for the prompt and one for the negative prompt."""

    CATEGORY = "LTX-2 Engine/prompt"
    DESCRIPTION = "Encodes a prompt for video and sound together. The negative prompt is a second one of these nodes."
    SEARCH_ALIASES = ["ltx prompt", "text encode", "gemma"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.CONTEXT,)
    RETURN_NAMES = ("context",)
    OUTPUT_TOOLTIPS = ("The encoded prompt, for the guider.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": LINK(links.MODEL, "The model whose text encoder reads the prompt."),
                "prompt": STRING(
                    "",
                    "What happens, how it looks and how it sounds, in plain sentences. At most 1024 tokens are read.",
                    multiline=True,
                ),
            }
        }

    @classmethod
    def execute(cls, model, prompt):
        return (model.engine.encode(prompt),)
