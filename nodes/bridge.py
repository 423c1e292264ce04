"""Bridges to ComfyUI's own text conditioning and latents."""

from __future__ import annotations

from . import links
from .fields import FLOAT, LINK


class LTX2ContextFromNative:
    """Takes the text conditioning of ComfyUI's own LTX-2 text encoder."""

    CATEGORY = "LTX-2 Engine/native"
    DESCRIPTION = "Takes text conditioning from ComfyUI's own LTX-2 text encoder in place of LTX-2 Encode Prompt."
    FUNCTION = "execute"
    RETURN_TYPES = (links.CONTEXT,)
    RETURN_NAMES = ("context",)
    OUTPUT_TOOLTIPS = ("The prompt, for the guider.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": LINK(links.MODEL, "The model whose connectors finish the encoding."),
                "conditioning": LINK("CONDITIONING", "Conditioning from an LTX-2 text encoder."),
            }
        }

    @classmethod
    def execute(cls, model, conditioning):
        return (model.engine.encode_native(conditioning),)


class LTX2LatentFromNative:
    """Takes a native LATENT that holds video and sound."""

    CATEGORY = "LTX-2 Engine/native"
    DESCRIPTION = (
        "Takes a native LATENT with video and sound (LTXV Concat AV Latent), its noise mask included: 1 is made anew, 0 "
        "is kept."
    )
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The latent, for sampling or decoding.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples": LINK("LATENT", "A LATENT with video and sound."),
                "fps": FLOAT(24.0, 1.0, 240.0, "Frames per second of the clip; a LATENT does not say.", step=1.0),
            }
        }

    @classmethod
    def execute(cls, samples, fps):
        from ..ltx2_core.conditioning.native import from_native
        from .host import split_nested

        mask = samples.get("noise_mask")
        return (from_native(split_nested(samples["samples"]), None if mask is None else split_nested(mask), fps),)


class LTX2LatentToNative:
    """Gives a sampled latent as a native LATENT with video and sound."""

    CATEGORY = "LTX-2 Engine/native"
    DESCRIPTION = "Gives a sampled latent as a native LATENT with video and sound, for ComfyUI's own nodes."
    FUNCTION = "execute"
    RETURN_TYPES = ("LATENT", "FLOAT")
    RETURN_NAMES = ("samples", "fps")
    OUTPUT_TOOLTIPS = ("Video and sound in one LATENT.", "Frames per second of the clip.")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": LINK(links.LATENT, "A sampled latent.")}}

    @classmethod
    def execute(cls, latent):
        from .host import nested_latent

        video, audio = latent.latents.video, latent.latents.audio
        if video is None or audio is None:
            raise ValueError("this latent has no content yet: connect the sampler's output")
        samples = {"samples": nested_latent(video, audio)}
        if latent.masks.video is not None or latent.masks.audio is not None:
            samples["noise_mask"] = nested_latent(*_whole_masks(latent))
        return samples, latent.clip.fps


def _whole_masks(latent):
    """Both masks; a stream without one is made anew everywhere."""
    import torch

    return (
        torch.ones(part.shape[0], 1, *part.shape[2:]) if mask is None else mask
        for mask, part in (
            (latent.masks.video, latent.latents.video),
            (latent.masks.audio, latent.latents.audio),
        )
    )
