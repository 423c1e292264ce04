"""Two stages: enlarging a latent, and choosing whose sound is kept."""

from __future__ import annotations

from ..ltx2_core.host import host
from . import links
from .fields import COMBO, LINK


class LTX2UpscaleLatent:
    """Enlarges a sampled latent in space or time, for a second stage of sampling."""

    CATEGORY = "LTX-2 Engine/latent"
    DESCRIPTION = (
        "Enlarges a sampled latent with a latent upsampler: twice or 1.5 times the size, or twice the frames a second. "
        "Sample it again with the distilled stage 2 sigmas. Images and keyframes are added anew at the new size."
    )
    SEARCH_ALIASES = ["latent upscale", "two stage", "upsampler"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The larger latent, with its sound unchanged.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": LINK(links.MODEL, "The model that sampled the latent."),
                "latent": LINK(links.LATENT, "The sampled latent.", lazy=True),
                "upsampler": COMBO(
                    host().list_models("latent_upscale_models"),
                    "The upsampler in models/latent_upscale_models, of the model's version.",
                ),
            }
        }

    @classmethod
    def check_lazy_status(cls, model, upsampler, latent=None):
        """Refuse an upsampler that does not fit before the latent is sampled."""
        from ..ltx2_core.upsampler_files import read_fitting_upsampler

        files = model.engine.files
        path = host().resolve_model("latent_upscale_models", upsampler)
        read_fitting_upsampler(path, files.config.video_vae.latent_channels, files.version.label)
        return ["latent"]

    @classmethod
    def execute(cls, model, latent, upsampler):
        return (model.engine.upscale(latent, host().resolve_model("latent_upscale_models", upsampler)),)


class LTX2JoinStreams:
    """Takes the picture of one latent and the sound of another."""

    CATEGORY = "LTX-2 Engine/latent"
    DESCRIPTION = (
        "Takes the picture of one latent and the sound of another: after two stages, the sound of the first stage is what "
        "the guided recipes deliver."
    )
    SEARCH_ALIASES = ["stage audio", "combine latents"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("Picture and sound in one latent.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "video_from": LINK(links.LATENT, "The latent whose picture is taken."),
                "audio_from": LINK(links.LATENT, "The latent whose sound is taken; it must be as long."),
            }
        }

    @classmethod
    def execute(cls, video_from, audio_from):
        return (video_from.with_audio_of(audio_from),)
