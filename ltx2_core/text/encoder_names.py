"""Names of a text encoder's tensors: in the files that users have, and in the module that ``gemma`` builds."""

from __future__ import annotations

# A text tensor's prefix: hub files, transformers' own module tree, single files for ComfyUI and GGUF as it is presented
_PREFIXES = ("language_model.model.", "model.language_model.", "model.")
_PARTS = ("embed_tokens.", "layers.", "norm.")
# what llama.cpp calls a layer; those that belong to Gemma 3 are presented under its own names
_UNKNOWN_LAYER = "blk."


def module_name(checkpoint_name: str) -> str | None:
    """The name in ``build_gemma``'s module; None for tensors that encoding does not need (vision, projector, lm_head).

    A tensor of a layer that Gemma does not have keeps its name, so that a comparison with the module finds it.
    """
    if checkpoint_name.startswith(_UNKNOWN_LAYER):
        return checkpoint_name
    for prefix in _PREFIXES:
        name = checkpoint_name.removeprefix(prefix)
        if name != checkpoint_name and name.startswith(_PARTS):
            return name
    return None
