"""Conditioning on images."""

from __future__ import annotations

from . import links
from .fields import FLOAT, INT, LINK


class LTX2ImageCondition:
    """Makes an image the first frame of the clip."""

    CATEGORY = "LTX-2 Engine/conditioning"
    DESCRIPTION = (
        "Makes an image the first frame of the clip. It is scaled to cover the clip's size and cut at the centre."
    )
    SEARCH_ALIASES = ["image to video", "i2v", "first frame"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The latent that starts from the image.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "latent": LINK(links.LATENT, "The clip that starts from the image."),
                "image": LINK("IMAGE", "The first frame; of several images the first counts."),
                "strength": FLOAT(
                    1.0, 0.0, 1.0, "How firmly the frame is kept: 1 keeps it, lower values let the model change it."
                ),
            },
            "optional": {
                "crf": INT(
                    -1,
                    -1,
                    51,
                    "H.264 compression of the image before use, as the model saw in training: higher is rougher and moves "
                    "more. -1 takes the model's own (33, from 2.4 on 18), 0 leaves the image alone.",
                    advanced=True,
                ),
            },
        }

    @classmethod
    def execute(cls, latent, image, strength, crf=-1):
        from ..ltx2_core.conditioning.image import ImageCondition

        return (latent.with_condition(ImageCondition(image[0, ..., :3], strength, None if crf < 0 else crf)),)
