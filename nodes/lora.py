"""LoRAs."""

from __future__ import annotations

from ..ltx2_core.host import host
from . import links
from .fields import COMBO, FLOAT, LINK


class LTX2LoadLora:
    """Adds a LoRA to the model. Several nodes in a row add several."""

    CATEGORY = "LTX-2 Engine/loading"
    DESCRIPTION = (
        "Adds a LoRA to the model's transformer. Several in a row add up. The model without it stays as it was, so two "
        "stages can use different LoRAs or strengths."
    )
    SEARCH_ALIASES = ["lora", "ic-lora", "distilled lora"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with the LoRA.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": LINK(links.MODEL, "The model to add the LoRA to."),
                "lora": COMBO(host().list_models("loras"), "The LoRA in models/loras."),
                "strength": FLOAT(
                    1.0, -10.0, 10.0, "How strongly the LoRA counts: 1 is what it was trained for, 0 leaves it out."
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora, strength, model=None):
        path = host().resolve_model("loras", lora)
        return f"{path.stat().st_size} {path.stat().st_mtime_ns} {strength}"

    @classmethod
    def execute(cls, model, lora, strength):
        return (model.with_lora(host().resolve_model("loras", lora), strength),)
