"""Loading a model."""

from __future__ import annotations

from ..ltx2_core.host import host
from ..ltx2_core.model_spec import DTYPES, ModelSpec
from . import links
from .fields import COMBO


class LTX2LoadModel:
    """Names the files of a model and checks that they belong together. Weights are read when they are first used."""

    CATEGORY = "LTX-2 Engine/loading"
    DESCRIPTION = (
        "Opens an LTX-2 checkpoint (2.0 or 2.3) with its Gemma 3 text encoder. Headers are checked at once; weights are "
        "read when they are first used."
    )
    SEARCH_ALIASES = ["ltx", "ltxv", "checkpoint", "load ltx-2"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model: transformer, text encoder, VAEs and vocoder in one handle.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "checkpoint": COMBO(
                    host().list_models("checkpoints"),
                    "The full LTX-2 checkpoint in models/checkpoints: transformer, VAEs and vocoder in one file.",
                ),
                "text_encoder": COMBO(
                    host().list_text_encoders(),
                    "The Gemma 3 folder in models/text_encoders, with config.json, weights and tokenizer.",
                ),
            },
            "optional": {
                "dtype": COMBO(
                    DTYPES,
                    "Precision of the weights. auto is bfloat16 on a GPU and float32 on the CPU; float32 takes twice the "
                    "memory of bfloat16.",
                    advanced=True,
                ),
                "device": COMBO(
                    ["auto", *host().compute_devices()],
                    "Where the model runs. auto is the host's choice, usually the first GPU.",
                    advanced=True,
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, checkpoint, text_encoder, dtype="auto", device="auto"):
        return str(cls._spec(checkpoint, text_encoder, dtype, device))

    @classmethod
    def execute(cls, checkpoint, text_encoder, dtype="auto", device="auto"):
        from ..ltx2_core.engine import ModelHandle, open_engine

        spec = cls._spec(checkpoint, text_encoder, dtype, device)
        return (ModelHandle(spec, open_engine(spec)),)

    @staticmethod
    def _spec(checkpoint, text_encoder, dtype, device):
        return ModelSpec.of(
            host().resolve_model("checkpoints", checkpoint),
            host().resolve_text_encoder(text_encoder),
            dtype=dtype,
            device=host().default_device() if device == "auto" else device,
        )
