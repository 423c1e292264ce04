"""Conditioning on pictures: first image, keyframes, reference video."""

from __future__ import annotations

from . import links
from .fields import FLOAT, INT, LINK

_CRF = (
    "H.264 compression of a single image before use, as the model saw in training: higher is rougher and moves more. -1 "
    "takes the model's own (33, from 2.4 on 18), 0 leaves the image alone."
)


def crf_field():
    return INT(-1, -1, 51, _CRF, advanced=True)


def attention_field(what: str):
    return FLOAT(1.0, 0.0, 1.0, f"How strongly the clip looks at the {what}: 1 fully, 0 not at all.", advanced=True)


def chosen_crf(crf: int) -> int | None:
    """The widget's -1 stands for the model version's default."""
    return None if crf < 0 else crf


def weighted(condition, attention: float, mask=None):
    """The condition, looked at with a strength where one was chosen."""
    from ..ltx2_core.conditioning.weighted import AttentionStrength

    return condition if attention == 1.0 and mask is None else AttentionStrength(condition, attention, mask)


class LTX2ImageCondition:
    """Makes an image the first frame of the clip, or puts it in place of a later latent frame."""

    CATEGORY = "LTX-2 Engine/conditioning"
    DESCRIPTION = (
        "Makes an image the first frame of the clip, or puts it in place of a later latent frame. It is scaled to cover "
        "the clip's size and cut at the centre."
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
                "image": LINK("IMAGE", "The first frame, or 8k + 1 frames of a clip."),
                "strength": FLOAT(
                    1.0, 0.0, 1.0, "How firmly the frame is kept: 1 keeps it, lower values let the model change it."
                ),
            },
            "optional": {
                "crf": crf_field(),
                "latent_index": INT(
                    0,
                    -1024,
                    1024,
                    "Latent frame where the image stands: 0 is the first frame, each later one holds 8 frames; negative "
                    "counts from the end.",
                    advanced=True,
                ),
            },
        }

    @classmethod
    def execute(cls, latent, image, strength, crf=-1, latent_index=0):
        from ..ltx2_core.conditioning.image import ImageCondition

        condition = ImageCondition(image[..., :3], strength, chosen_crf(crf), latent_index)
        return (latent.with_condition(condition),)


class LTX2Keyframe:
    """Leads the clip through an image at a frame of your choice."""

    CATEGORY = "LTX-2 Engine/conditioning"
    DESCRIPTION = (
        "Leads the clip through an image at a frame of your choice, as a keyframe beside the clip's own frames."
    )
    SEARCH_ALIASES = ["keyframe interpolation", "guide", "add guide"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The latent with the keyframe.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "latent": LINK(links.LATENT, "The clip that passes through the image."),
                "image": LINK("IMAGE", "The keyframe, or 8k + 1 frames of a clip."),
                "frame": INT(-1, -8193, 8192, "Frame where it stands; negative counts from the end, -1 is the last."),
                "strength": FLOAT(1.0, 0.0, 1.0, "How firmly the model is held to the image: 1 fully, 0 not at all."),
            },
            "optional": {"crf": crf_field(), "attention": attention_field("keyframe")},
        }

    @classmethod
    def execute(cls, latent, image, frame, strength, crf=-1, attention=1.0):
        from ..ltx2_core.conditioning.keyframe import KeyframeCondition

        condition = KeyframeCondition(image[..., :3], frame, strength, chosen_crf(crf))
        return (latent.with_condition(weighted(condition, attention)),)


class LTX2FirstLastFrame:
    """Starts the clip with one image and ends it with another."""

    CATEGORY = "LTX-2 Engine/conditioning"
    DESCRIPTION = "Starts the clip with one image and ends it with another; the model makes what lies between."
    SEARCH_ALIASES = ["flf2v", "first last frame", "interpolate"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The latent between the two images.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "latent": LINK(links.LATENT, "The clip between the images."),
                "first": LINK("IMAGE", "The first frame."),
                "last": LINK("IMAGE", "The last frame."),
                "first_strength": FLOAT(1.0, 0.0, 1.0, "How firmly the first frame is kept: 1 keeps it."),
                "last_strength": FLOAT(1.0, 0.0, 1.0, "How firmly the model is held to the last frame: 1 fully."),
            },
            "optional": {"crf": crf_field()},
        }

    @classmethod
    def execute(cls, latent, first, last, first_strength, last_strength, crf=-1):
        from ..ltx2_core.conditioning.keyframe import first_last

        pair = first_last(first[0, ..., :3], last[0, ..., :3], first_strength, last_strength, chosen_crf(crf))
        return (latent.with_condition(*pair),)


class LTX2ReferenceVideo:
    """Shows the model a video while it makes the clip, for in-context LoRAs."""

    CATEGORY = "LTX-2 Engine/conditioning"
    DESCRIPTION = (
        "Shows the model a video while it makes the clip. An in-context LoRA (IC-LoRA) on the model says what to do with "
        "it: depth, pose, detail and so on."
    )
    SEARCH_ALIASES = ["ic-lora", "in-context", "reference", "control"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The latent with the reference.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "latent": LINK(links.LATENT, "The clip that follows the reference."),
                "model": LINK(
                    links.MODEL, "The model with the in-context LoRA, whose file says how to scale the reference."
                ),
                "images": LINK("IMAGE", "The reference video; frames beyond the clip's length are left out."),
                "strength": FLOAT(1.0, 0.0, 1.0, "How clearly the reference is shown: 1 as it is, 0 as noise."),
            },
            "optional": {
                "downscale": INT(
                    0,
                    0,
                    16,
                    "How many times smaller than the clip the reference is encoded. 0 takes what the LoRA's file says.",
                    advanced=True,
                ),
                "temporal_scale": INT(
                    0,
                    0,
                    16,
                    "Every how many frames of the reference are used. 0 takes what the LoRA's file says.",
                    advanced=True,
                ),
                "attention": attention_field("reference"),
                "attention_mask": LINK("MASK", "Where in the picture the clip looks at the reference: white looks."),
            },
        }

    @classmethod
    def execute(
        cls, latent, model, images, strength, downscale=0, temporal_scale=0, attention=1.0, attention_mask=None
    ):
        from ..ltx2_core.conditioning.reference import ReferenceVideo

        factors = model.reference_factors()
        condition = ReferenceVideo(
            images[..., :3],
            downscale=downscale or factors[0],
            temporal_scale=temporal_scale or factors[1],
            strength=strength,
        )
        return (latent.with_condition(weighted(condition, attention, attention_mask)),)
