"""Noise levels, sampler choice and sampling."""

from __future__ import annotations

from ..ltx2_core.presets import SAMPLERS, SCHEDULES
from . import links
from .fields import BOOL, COMBO, FLOAT, INT, LINK


class LTX2Sigmas:
    """The noise levels of the steps."""

    CATEGORY = "LTX-2 Engine/sampling"
    DESCRIPTION = (
        "The noise levels that sampling steps through. distilled is the fixed 8-step list of distilled checkpoints; "
        "ltx-2 makes a schedule of any length for full checkpoints."
    )
    SEARCH_ALIASES = ["scheduler", "steps", "ltx scheduler"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.SIGMAS,)
    RETURN_NAMES = ("sigmas",)
    OUTPUT_TOOLTIPS = ("Noise levels, one more than there are steps.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "schedule": COMBO(
                    SCHEDULES,
                    "distilled: 8 fixed steps. distilled stage 2: 3 fixed steps for a refined latent. ltx-2: the number of "
                    "steps below.",
                ),
                "steps": INT(
                    30, 1, 1000, "Steps of the ltx-2 schedule; more steps take longer. 40 for 2.0, 30 for 2.3 and 2.5."
                ),
            },
            "optional": {
                "max_shift": FLOAT(
                    2.05,
                    -100.0,
                    100.0,
                    "ltx-2: shift at 4096 tokens; higher spends more steps on noise.",
                    advanced=True,
                ),
                "base_shift": FLOAT(
                    0.95,
                    -100.0,
                    100.0,
                    "ltx-2: shift at 1024 tokens; higher spends more steps on noise.",
                    advanced=True,
                ),
                "stretch": BOOL(True, "ltx-2: stretch the levels so that the last one is terminal.", advanced=True),
                "terminal": FLOAT(0.1, 0.001, 0.999, "ltx-2: the last noise level before 0.", advanced=True),
                "latent": LINK(
                    links.LATENT, "ltx-2: shift by this latent's size. Without it the schedule is that of 4096 tokens."
                ),
            },
        }

    @classmethod
    def execute(cls, schedule, steps, max_shift=2.05, base_shift=0.95, stretch=True, terminal=0.1, latent=None):
        from ..ltx2_core.sampling import sigmas

        tokens = sigmas.DEFAULT_TOKENS if latent is None else latent.clip.num_video_tokens
        settings = {"max_shift": max_shift, "base_shift": base_shift, "stretch": stretch, "terminal": terminal}
        return (sigmas.schedule(schedule, steps, tokens, **settings),)


class LTX2SelectSampler:
    """The solver that steps through the noise levels."""

    CATEGORY = "LTX-2 Engine/sampling"
    DESCRIPTION = "Chooses the solver that steps through the noise levels."
    SEARCH_ALIASES = ["ksampler select", "solver"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.SAMPLER,)
    RETURN_NAMES = ("sampler",)
    OUTPUT_TOOLTIPS = ("The solver, for the sampler node.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sampler": COMBO(SAMPLERS, "euler: one evaluation of the model a step.")}}

    @classmethod
    def execute(cls, sampler):
        from ..ltx2_core.sampling.samplers import SamplerChoice

        return (SamplerChoice(sampler),)


class LTX2Sampler:
    """Samples picture and sound together."""

    CATEGORY = "LTX-2 Engine/sampling"
    DESCRIPTION = "Samples picture and sound together. The same seed and settings give the same clip."
    SEARCH_ALIASES = ["ksampler", "ltx sampler", "generate video"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.LATENT,)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The sampled latent, for decoding.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "guider": LINK(links.GUIDER, "Model, prompts and guidance."),
                "latent": LINK(links.LATENT, "The clip to make: its size, and what it is conditioned on."),
                "sigmas": LINK(links.SIGMAS, "The noise levels to step through."),
                "sampler": LINK(links.SAMPLER, "The solver."),
                "seed": INT(
                    10,
                    0,
                    0xFFFFFFFFFFFFFFFF,
                    "Seed of the starting noise. Another seed gives another clip.",
                    control_after_generate=True,
                ),
            }
        }

    @classmethod
    def execute(cls, guider, latent, sigmas, sampler, seed):
        from ..ltx2_core.engine import SampleJob

        job = SampleJob(latent, guider.positive, guider.negative, guider.guidance, sigmas, sampler, seed)
        return (guider.model.engine.sample(job),)
