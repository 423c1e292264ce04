"""Starting latents."""

from __future__ import annotations

from ..ltx2_core.shapes import (
    MAX_FPS,
    MAX_FRAMES,
    MAX_SIDE,
    VIDEO_SPACE_FACTOR,
    ClipShape,
    ShapeError,
    frames_for_seconds,
)
from . import links
from .fields import COMBO, FLOAT, INT

STREAMS = ("video and sound", "video only", "sound only")


class LTX2EmptyLatent:
    """The size and length of a new clip, with sound of the same length."""

    CATEGORY = "LTX-2 Engine/latent"
    DESCRIPTION = "Sets size, length and frame rate of a new clip. Its sound gets the same length."
    SEARCH_ALIASES = ["ltx size", "empty ltx latent", "resolution"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("An empty latent of this size.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "width": INT(
                    768,
                    VIDEO_SPACE_FACTOR,
                    MAX_SIDE,
                    "Width in pixels, a multiple of 32. More pixels take more time and memory.",
                    step=VIDEO_SPACE_FACTOR,
                ),
                "height": INT(
                    512,
                    VIDEO_SPACE_FACTOR,
                    MAX_SIDE,
                    "Height in pixels, a multiple of 32. More pixels take more time and memory.",
                    step=VIDEO_SPACE_FACTOR,
                ),
                "frames": INT(
                    121, 1, MAX_FRAMES, "Number of frames, 8k + 1. Not used when seconds is above 0.", step=8
                ),
                "fps": FLOAT(
                    24.0, 1.0, MAX_FPS, "Frames per second. The model knows 24, 25, 30, 48, 50 and 60 best.", step=1.0
                ),
            },
            "optional": {
                "seconds": FLOAT(
                    0.0,
                    0.0,
                    1000.0,
                    "Length in seconds, rounded down to 8k + 1 frames. 0 takes the number of frames instead.",
                    step=0.5,
                ),
                "streams": COMBO(
                    STREAMS,
                    "What is made. Sound only takes its length from the frames and ignores width and height.",
                    advanced=True,
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, width, height, frames, fps, seconds=0.0):
        """Illegal sizes are said while the prompt is checked; values that come from links are checked when they run."""
        numbers = width, height, frames, fps, seconds
        # of a link there is None, and what is no number the host refuses by itself
        if not all(isinstance(number, (int, float)) for number in numbers):
            return True
        try:
            cls._clip(*numbers)
        except ShapeError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, width, height, frames, fps, seconds=0.0, streams="video and sound"):
        from ..ltx2_core.conditioning.latent import AVLatent

        clip = cls._clip(width, height, frames, fps, seconds)
        if streams == "sound only":
            return (AVLatent.sound_only(clip.frames, clip.fps),)
        return (AVLatent.video_only(clip) if streams == "video only" else AVLatent(clip),)

    @staticmethod
    def _clip(width, height, frames, fps, seconds):
        return ClipShape(frames_for_seconds(seconds, fps) if seconds else frames, height, width, fps)
