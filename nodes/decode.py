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
        if not latent.streams.video:
            raise ValueError("this clip is sound only: decode it with LTX-2 Decode Audio")
        clip = model.engine.decode(latent, tiling)
        return clip.frames, _audio(clip), clip.fps


class LTX2DecodeAudio:
    """Decodes the sound of a sampled latent, and nothing else."""

    CATEGORY = "LTX-2 Engine/latent"
    DESCRIPTION = "Decodes the sound of a sampled latent, and nothing else."
    SEARCH_ALIASES = ["vae decode audio", "text to audio"]
    FUNCTION = "execute"
    RETURN_TYPES = ("AUDIO",)
    RETURN_NAMES = ("audio",)
    OUTPUT_TOOLTIPS = ("The sound as the model made it.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": LINK(links.MODEL, "The model that sampled the latent."),
                "latent": LINK(links.LATENT, "The sampled latent."),
            }
        }

    @classmethod
    def execute(cls, model, latent):
        if not latent.streams.audio:
            raise ValueError("this clip has no sound: it was made as video only")
        return (_audio(model.engine.decode(latent.without_video(), "auto")),)


def _audio(clip):
    """A native AUDIO; None for a clip without sound, which Create Video takes for silence."""
    return None if clip.waveform is None else {"waveform": clip.waveform, "sample_rate": clip.sample_rate}
