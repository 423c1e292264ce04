"""Clips made from clips: extension, retake, inpainting."""

from __future__ import annotations

from . import links
from .fields import BOOL, COMBO, FLOAT, LINK
from .sound import sound_of


class LTX2ExtendVideo:
    """Makes what follows a clip, or what leads up to it."""

    CATEGORY = "LTX-2 Engine/editing"
    DESCRIPTION = (
        "Makes what follows a clip (forward) or what leads up to it (backward). The latent sets the length of the whole "
        "clip, the given part included."
    )
    SEARCH_ALIASES = ["extend", "continue video", "outro", "intro"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The latent that goes on from the clip.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "latent": LINK(links.LATENT, "The whole clip: the given part and what is made."),
                "images": LINK("IMAGE", "The clip that is there, 8k + 1 frames."),
                "direction": COMBO(("forward", "backward"), "forward goes on from the clip, backward leads up to it."),
                "strength": FLOAT(1.0, 0.0, 1.0, "How firmly the given frames are kept: 1 keeps them exactly."),
            },
            "optional": {"audio": LINK("AUDIO", "The sound of the given clip, kept as long as it lasts.")},
        }

    @classmethod
    def execute(cls, latent, images, direction, strength, audio=None):
        from ..ltx2_core.conditioning.extension import ExtendAudio, ExtendVideo

        latent = latent.with_condition(ExtendVideo(images[..., :3], direction, strength))
        if audio is not None:
            latent = latent.with_condition(ExtendAudio(sound_of(audio), images.shape[0], direction))
        return (latent,)


class LTX2Retake:
    """Makes a span of a clip again, in picture, sound or both."""

    CATEGORY = "LTX-2 Engine/editing"
    DESCRIPTION = "Makes a span of a clip again, in picture, sound or both; everything else stays as it is."
    SEARCH_ALIASES = ["retake", "regenerate", "redo span"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The latent of the clip, with the span to make again.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "latent": LINK(links.LATENT, "The clip, with the size and number of frames of the source."),
                "images": LINK("IMAGE", "The source, 8k + 1 frames."),
                "start": FLOAT(0.0, 0.0, 1000.0, "Start of the span, in seconds.", step=0.1),
                "end": FLOAT(1.0, 0.0, 1000.0, "End of the span, in seconds.", step=0.1),
                "retake_video": BOOL(True, "Whether the picture is made again; otherwise it is kept."),
                "retake_audio": BOOL(True, "Whether the sound is made again; otherwise it is kept."),
            },
            "optional": {
                "audio": LINK("AUDIO", "The source's sound; without it sound is made from scratch for the whole clip.")
            },
        }

    @classmethod
    def execute(cls, latent, images, start, end, retake_video, retake_audio, audio=None):
        from ..ltx2_core.conditioning.retake import retake

        sound = None if audio is None else sound_of(audio)
        conditions = retake(images[..., :3], sound, start, end, video=retake_video, audio=retake_audio)
        return (latent.with_condition(*conditions),)


class LTX2Inpaint:
    """Makes a masked region of a clip again."""

    CATEGORY = "LTX-2 Engine/editing"
    DESCRIPTION = "Makes the masked region of a clip again and keeps the rest."
    SEARCH_ALIASES = ["inpaint", "mask", "replace region"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The latent of the clip, with the region to make again.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "latent": LINK(links.LATENT, "The clip, with the number of frames of the source."),
                "images": LINK("IMAGE", "The source, 8k + 1 frames."),
                "mask": LINK("MASK", "White is made again; one mask for all frames, or one a frame."),
            }
        }

    @classmethod
    def execute(cls, latent, images, mask):
        from ..ltx2_core.conditioning.masks import InpaintVideo

        return (latent.with_condition(InpaintVideo(images[..., :3], mask)),)
