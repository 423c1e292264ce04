"""Guidance."""

from __future__ import annotations

import logging

from ..ltx2_core.presets import EVALUATIONS, GUIDANCE_PRESETS
from . import links
from .fields import COMBO, FLOAT, INT, LINK, STRING

_LOG = logging.getLogger("ltx2.nodes")

_STRENGTHS = {
    "cfg": "How strongly the {} follows the prompt and avoids the negative one. 1 is off and saves a pass.",
    "stg": "How strongly the {} is steered away from a prediction with weakened structure. 0 is off and saves a pass.",
    "modality": "How strongly the {} follows the other stream, sound or picture. 1 is off and saves a pass.",
    "rescale": "How far the contrast of the guided {} is pulled back to the unguided one. 0 is off, 1 all the way.",
}
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
                    "2.0 or guided 2.3/2.5 for full checkpoints of that version (four passes a step), hq for full "
                    "checkpoints with the res_2s sampler (three passes).",
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
                "negative": LINK(
                    links.CONTEXT, "The negative prompt; needed when video_cfg or audio_cfg is not 1, or by CFG++."
                ),
                "evaluation": COMBO(
                    EVALUATIONS,
                    "How the passes of a step run. split: one after the other, sharing what they have in common; batched: "
                    "all at once, which takes more memory. auto chooses by size.",
                    advanced=True,
                ),
                **{
                    f"{stream}_skip_step": INT(
                        0,
                        0,
                        100,
                        f"How many steps after each evaluated one reuse its {what}; higher is faster and rougher. 0 is off.",
                        advanced=True,
                    )
                    for stream, what in (("video", "picture"), ("audio", "sound"))
                },
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
    def execute(
        cls,
        model,
        positive,
        preset,
        video_cfg,
        video_stg,
        video_modality,
        video_rescale,
        audio_cfg,
        audio_stg,
        audio_modality,
        audio_rescale,
        stg_blocks,
        negative=None,
        evaluation="auto",
        video_skip_step=0,
        audio_skip_step=0,
    ):
        from ..ltx2_core.av import AV
        from ..ltx2_core.handles import Guider
        from ..ltx2_core.sampling.guidance import StreamGuidance

        blocks = parse_blocks(stg_blocks)
        strengths = AV(
            {"cfg": video_cfg, "stg": video_stg, "modality": video_modality, "rescale": video_rescale},
            {"cfg": audio_cfg, "stg": audio_stg, "modality": audio_modality, "rescale": audio_rescale},
        )
        _log_changes(preset, strengths, stg_blocks, evaluation)
        guidance = strengths.map(
            lambda values, skip: StreamGuidance(**values, stg_blocks=blocks, skip_step=skip),
            AV(video_skip_step, audio_skip_step),
        )
        return (Guider(model, positive, negative, guidance, evaluation),)


def parse_blocks(text: str) -> tuple[int, ...]:
    """Block numbers from a list separated by commas. Raises ValueError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and len(part) <= 4)]
    if wrong:
        raise ValueError(
            f"stg_blocks must be block numbers separated by commas, such as 28 or 27, 28; found {wrong[0]!r}"
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def _log_changes(preset: str, strengths, stg_blocks: str, evaluation: str) -> None:
    values = {f"video_{name}": value for name, value in strengths.video.items()}
    values |= {f"audio_{name}": value for name, value in strengths.audio.items()}
    values |= {"stg_blocks": stg_blocks, "evaluation": evaluation}
    own = GUIDANCE_PRESETS[preset]
    changed = [f"{name} {values[name]} (preset {own[name]})" for name in own if values[name] != own[name]]
    if changed:
        _LOG.info("guidance %r with %s", preset, ", ".join(changed))
