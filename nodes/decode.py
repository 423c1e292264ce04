"""Latents to pictures and sound."""

from __future__ import annotations

from ..ltx2_core.presets import TILINGS
from . import links
from .fields import COMBO, LINK


class LTX2Decode:
    """Decodes a sampled latent to frames and sound."""

    CATEGORY = "LTX-2 Engine/latent"
    DESCRIPTION = "Decodes a sampled latent to frames, sound and their frame rate, ready for Create Video."
    SEARCH_ALIASES = ["vae decode", "ltx decode"]
    FUNCTION = "execute"
    RETURN_TYPES = ("IMAGE", "AUDIO", "FLOAT")
    RETURN_NAMES = ("images", "audio", "fps")
    OUTPUT_TOOLTIPS = (
        "The frames.",
        "The sound as the model made it; up to 0.05 seconds shorter than the picture.",
        "Frames per second, for Create Video.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": LINK(links.MODEL, "The model that sampled the latent."),
                "latent": LINK(links.LATENT, "The sampled latent."),
            },
            "optional": {
                "tiling": COMBO(
                    TILINGS,
                    "How the picture is decoded in the memory there is. auto decides; none: the whole clip at once; "
                    "temporal: in stretches of time, with the same result; spatial: also in overlapping tiles.",
                    advanced=True,
                ),
            },
        }

    @classmethod
    def execute(cls, model, latent, tiling="auto"):
        clip = model.engine.decode(latent, tiling)
        return clip.frames, {"waveform": clip.waveform, "sample_rate": clip.sample_rate}, clip.fps
