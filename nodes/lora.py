"""LoRAs."""

from __future__ import annotations

from ..ltx2_core.host import host
from . import links
from .fields import COMBO, FLOAT, LINK

PRECISIONS = ("float32", "ltx-core")


class LTX2LoadLora:
    """Adds a LoRA to the model. Several nodes in a row add several."""

    CATEGORY = "LTX-2 Engine/loading"
    DESCRIPTION = (
        "Adds a LoRA to the model's transformer: LoRA, DoRA, LoHa, LoKr or full differences, under any usual names. Several "
        "in a row add up. The model without it stays as it was, so two stages can use different LoRAs or strengths, and a "
        "changed strength needs no new loading."
    )
    SEARCH_ALIASES = ["lora", "ic-lora", "distilled lora", "dora", "lokr", "loha"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.MODEL, "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = (
        "The model with the LoRA.",
        "What the model's LoRAs change and what in their files is not used, with names.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": LINK(links.MODEL, "The model to add the LoRA to."),
                "lora": COMBO(host().list_models("loras"), "The LoRA in models/loras."),
                "strength": FLOAT(
                    1.0, -10.0, 10.0, "How strongly the LoRA counts: 1 is what it was trained for, 0 leaves it out."
                ),
            },
            "optional": {
                "video": FLOAT(
                    1.0,
                    -10.0,
                    10.0,
                    "Factor of the strength in what writes to the video; 0 leaves the video alone.",
                    advanced=True,
                ),
                "audio": FLOAT(
                    1.0,
                    -10.0,
                    10.0,
                    "Factor of the strength in what writes to the sound; 0 leaves the sound alone.",
                    advanced=True,
                ),
                "precision": COMBO(
                    PRECISIONS,
                    "float32 sums all LoRAs exactly and rounds once. ltx-core repeats the reference's bfloat16 sums bit for "
                    "bit, for comparisons; it ignores alpha.",
                    advanced=True,
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, lora, strength, model=None, video=1.0, audio=1.0, precision="float32"):
        path = host().resolve_model("loras", lora)
        return f"{path.stat().st_size} {path.stat().st_mtime_ns} {strength} {video} {audio} {precision}"

    @classmethod
    def execute(cls, model, lora, strength, video=1.0, audio=1.0, precision="float32"):
        path = host().resolve_model("loras", lora)
        changed = model.with_lora(path, strength, video=video, audio=audio, parity=precision)
        return changed, changed.lora_report()
