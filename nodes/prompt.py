"""Enhancing and encoding prompts."""

from __future__ import annotations

from ..ltx2_core.presets import ENHANCE_TOPOLOGIES
from . import links
from .fields import COMBO, FLOAT, INT, LINK, STRING


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


class LTX2EnhancePrompt:
    """Turns a short idea into a full prompt, with the model's own text encoder."""

    CATEGORY = "LTX-2 Engine/prompt"
    DESCRIPTION = (
        "Turns a short idea into a full prompt: looks, motion, camera, sound and speech. Gemma 3, the text encoder of "
        "LTX-2.0 and 2.3, writes it; nothing else is loaded, and nothing leaves the machine. Below the node stands what it "
        "wrote."
    )
    SEARCH_ALIASES = ["prompt enhancer", "prompt expansion", "upsample prompt", "gemma", "llm"]
    FUNCTION = "execute"
    # it can be run by itself, to read the text before a clip is made
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("prompt",)
    OUTPUT_TOOLTIPS = ("The enhanced prompt, for LTX-2 Encode Prompt.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": LINK(links.MODEL, "The model whose text encoder writes the prompt: LTX-2.0 or 2.3."),
                "prompt": STRING(
                    "", "The idea. Everything in it is kept, and what is missing is added.", multiline=True
                ),
                "seed": INT(0, 0, 2**64 - 1, "Another seed gives another text. The same seed gives the same text."),
            },
            "optional": {
                "image": LINK(
                    "IMAGE",
                    "The first frame of the clip, which the text encoder looks at; of several the first. Its files must hold a "
                    "vision tower: the Hugging Face folder does, a GGUF does not.",
                ),
                "max_new_tokens": INT(512, 1, 1024, "The most tokens that are written; a word has one or two."),
                "temperature": FLOAT(
                    0.7,
                    0.0,
                    2.0,
                    "How freely it writes: 0 takes the likeliest words whatever the seed, higher values vary more.",
                    step=0.05,
                ),
                "system_prompt": STRING(
                    "",
                    "What the text encoder is told in place of the engine's own instructions. Empty takes those.",
                    multiline=True,
                    advanced=True,
                ),
                "topology": COMBO(
                    ENHANCE_TOPOLOGIES,
                    "How several GPUs share the writing; with one GPU it makes no difference. auto reads the fewest bytes a "
                    "token; single: one GPU; tensor: heads and layers are shared; helix: also the positions.",
                    advanced=True,
                ),
            },
        }

    @classmethod
    def execute(
        cls,
        model,
        prompt,
        seed,
        image=None,
        max_new_tokens=512,
        temperature=0.7,
        system_prompt="",
        topology="auto",
    ):
        from ..ltx2_core.text.enhance import EnhanceRequest

        text = model.engine.enhance(
            EnhanceRequest(
                prompt,
                None if image is None else image[0, ..., :3],
                seed,
                max_new_tokens,
                temperature,
                system_prompt,
                topology,
            )
        )
        return {"ui": {"text": [text]}, "result": (text,)}
