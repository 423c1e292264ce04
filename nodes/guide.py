"""Guidance."""

from __future__ import annotations

import logging

from ..ltx2_core.presets import GUIDANCE_PRESETS
from . import links
from .fields import COMBO, FLOAT, LINK, STRING

_LOG = logging.getLogger("ltx2.nodes")

_STRENGTHS = {
    "cfg": "How strongly the {} follows the prompt and avoids the negative one. 1 is off and saves a pass.",
    "stg": "How strongly the {} is steered away from a prediction with weakened structure. 0 is off and saves a pass.",
    "modality": "How strongly the {} follows the other stream, sound or picture. 1 is off and saves a pass.",
    "rescale": "How far the contrast of the guided {} is pulled back to the unguided one. 0 is off, 1 all the way.",
}
_NEUTRAL = {"cfg": 1.0, "stg": 0.0, "modality": 1.0, "rescale": 0.0}
_LIMIT = {"cfg": 100.0, "stg": 100.0, "modality": 100.0, "rescale": 1.0}


class LTX2Guider:
    """Joins model, prompts and guidance strengths. Choosing a preset fills the numbers; the numbers are what is used."""

    CATEGORY = "LTX-2 Engine/sampling"
    DESCRIPTION = (
        "Joins the model, the prompts and how strongly to guide. Choosing a preset fills the numbers below it; the "
        "numbers as shown are always what is used."
    )
    SEARCH_ALIASES = ["cfg", "stg", "modality guidance", "ltx guider"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.GUIDER,)
    RETURN_NAMES = ("guider",)
    OUTPUT_TOOLTIPS = ("Model, prompts and guidance, for the sampler.",)

    @classmethod
    def INPUT_TYPES(cls):
        preset = GUIDANCE_PRESETS["distilled"]
        numbers = {
            f"{stream}_{name}": FLOAT(preset[f"{stream}_{name}"], 0.0, _LIMIT[name], tooltip.format(what), step=0.05)
            for stream, what in (("video", "picture"), ("audio", "sound"))
            for name, tooltip in _STRENGTHS.items()
        }
        return {
            "required": {
                "model": LINK(links.MODEL, "The model to sample with."),
                "positive": LINK(links.CONTEXT, "The prompt."),
                "preset": COMBO(
                    list(GUIDANCE_PRESETS),
                    "Fills the numbers below: distilled for distilled checkpoints (no guidance, one pass a step), guided "
                    "2.0 or guided 2.3/2.5 for full checkpoints of that version (four passes a step).",
                    # the browser extension fills the widgets from this table
                    ltx2_fills={name: dict(values) for name, values in GUIDANCE_PRESETS.items()},
                ),
                **numbers,
                "stg_blocks": STRING(
                    str(preset["stg_blocks"]),
                    "Blocks whose self attention the stg pass skips, separated by commas: 29 for 2.0, 28 for 2.3 and 2.5.",
                ),
            },
            "optional": {
                "negative": LINK(links.CONTEXT, "The negative prompt; needed when video_cfg or audio_cfg is not 1."),
            },
        }

    @classmethod
    def fill(cls, name, value):
        """The inputs that choosing ``value`` for the input ``name`` fills, as the browser extension does."""
        return dict(GUIDANCE_PRESETS.get(value, {})) if name == "preset" else {}

    @classmethod
    def VALIDATE_INPUTS(cls, stg_blocks):
        try:
            parse_blocks(stg_blocks or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, positive, preset, stg_blocks, negative=None, **numbers):
        from ..ltx2_core.av import AV
        from ..ltx2_core.engine import Guider
        from ..ltx2_core.sampling.guidance import StreamGuidance

        _log_changes(preset, {**numbers, "stg_blocks": stg_blocks})
        blocks = parse_blocks(stg_blocks)
        guidance = AV(
            *(
                StreamGuidance(**{name: numbers[f"{stream}_{name}"] for name in _STRENGTHS}, stg_blocks=blocks)
                for stream in ("video", "audio")
            )
        )
        return (Guider(model, positive, negative, guidance),)


def parse_blocks(text: str) -> tuple[int, ...]:
    """Block numbers from a list separated by commas. Raises ValueError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and len(part) <= 4)]
    if wrong:
        raise ValueError(
            f"stg_blocks must be block numbers separated by commas, such as 28 or 27, 28; found {wrong[0]!r}"
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def _log_changes(preset: str, values: dict) -> None:
    changed = [
        f"{name} {values[name]} (preset {own})" for name, own in GUIDANCE_PRESETS[preset].items() if values[name] != own
    ]
    if changed:
        _LOG.info("guidance %r with %s", preset, ", ".join(changed))
