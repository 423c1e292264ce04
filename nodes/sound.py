"""Sound: video for a sound, a voice to follow, sound alone."""

from __future__ import annotations

from . import links
from .fields import BOOL, FLOAT, LINK


def sound_of(audio):
    """The first item of an AUDIO."""
    from ..ltx2_core.conditioning.audio import Sound

    return Sound(audio["waveform"][0], audio["sample_rate"])


class LTX2KeepAudio:
    """Makes video for a sound that is kept as it is."""

    CATEGORY = "LTX-2 Engine/sound"
    DESCRIPTION = (
        "Makes video for a sound that is kept as it is (audio to video). Give Create Video the sound from this node."
    )
    SEARCH_ALIASES = ["audio to video", "a2v", "lip sync", "soundtrack"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT, "AUDIO")
    RETURN_NAMES = ("latent", "audio")
    OUTPUT_TOOLTIPS = (
        "The latent whose sound is fixed.",
        "The part of the sound that goes with the clip, untouched, for Create Video.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "latent": LINK(links.LATENT, "The clip that is made for the sound."),
                "audio": LINK("AUDIO", "The sound."),
                "start": FLOAT(0.0, 0.0, 36000.0, "Where in the sound the clip starts, in seconds.", step=0.1),
                "pad": BOOL(False, "Whether silence fills what a too short sound lacks; otherwise it is refused."),
            }
        }

    @classmethod
    def execute(cls, latent, audio, start, pad):
        from ..ltx2_core.conditioning.audio import KeepAudio

        condition = KeepAudio(sound_of(audio), start, pad)
        condition.check(latent.clip)
        heard = condition.heard(latent.clip)
        kept = {"waveform": heard.waveform[None], "sample_rate": heard.sample_rate}
        return latent.with_condition(condition), kept


class LTX2ReferenceAudio:
    """Lets the clip's sound follow a voice."""

    CATEGORY = "LTX-2 Engine/sound"
    DESCRIPTION = "Lets the clip's sound follow a voice or sound, as if it was heard just before the clip starts."
    SEARCH_ALIASES = ["voice reference", "id-lora", "dub"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The latent with the reference sound.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "latent": LINK(links.LATENT, "The clip whose sound follows the reference."),
                "audio": LINK("AUDIO", "The reference; longer ones take more time and memory."),
                "strength": FLOAT(1.0, 0.0, 1.0, "How clearly the reference is heard: 1 as it is, 0 as noise."),
            }
        }

    @classmethod
    def execute(cls, latent, audio, strength):
        from ..ltx2_core.conditioning.audio import ReferenceAudio

        return (latent.with_condition(ReferenceAudio(sound_of(audio), strength)),)
