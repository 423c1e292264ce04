"""Noise levels, sampler choice and sampling."""

from __future__ import annotations

from ..ltx2_core.presets import NOISE_KINDS, NOISE_LAYOUTS, SAMPLER_PRESETS, SAMPLERS, SCHEDULES
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
        return {
            "required": {
                "sampler": COMBO(
                    SAMPLERS,
                    "euler: one evaluation of the model a step. euler_ancestral: with fresh noise every step, for distilled "
                    "2.5. res_2s: two evaluations a step and fresh noise, best quality. gradient_estimation: fewer steps "
                    "for the same quality. euler_cfg_pp: CFG++, needs a negative prompt. Choosing one fills the settings.",
                    # the browser extension fills the widgets from this table
                    ltx2_fills={name: dict(values) for name, values in SAMPLER_PRESETS.items()},
                ),
            },
            "optional": {
                "eta": FLOAT(
                    0.0,
                    0.0,
                    1.0,
                    "Share of each step that is replaced by fresh noise (euler_ancestral, res_2s, euler_cfg_pp); 0 is "
                    "deterministic.",
                ),
                "substep_eta": FLOAT(0.5, 0.0, 1.0, "The same for the midpoint of a step (res_2s).", advanced=True),
                "s_noise": FLOAT(
                    1.0, 0.0, 100.0, "Strength of the fresh noise (euler_ancestral, euler_cfg_pp).", advanced=True
                ),
                "bong": BOOL(True, "Whether a noised midpoint moves the start of its step (res_2s).", advanced=True),
                "gamma": FLOAT(
                    2.0,
                    0.0,
                    10.0,
                    "How far the velocity is extrapolated (gradient_estimation); 1 is plain Euler.",
                    advanced=True,
                ),
                "noise_kind": COMBO(
                    NOISE_KINDS,
                    "normalised: fresh noise of exactly mean 0 and deviation 1; plain: as drawn.",
                    default="plain",
                    advanced=True,
                ),
                "sde_seed": INT(
                    -1,
                    -1,
                    0xFFFFFFFFFFFFFFFF,
                    "Seed of the fresh noise. -1 is the reference's fixed seed: every clip gets the same fresh noise.",
                    advanced=True,
                ),
                "follow_seed": BOOL(
                    False, "Whether fresh noise follows the sampler's seed instead of sde_seed.", advanced=True
                ),
            },
        }

    @classmethod
    def fill(cls, name, value):
        """The inputs that choosing ``value`` for the input ``name`` fills, as the browser extension does."""
        return dict(SAMPLER_PRESETS.get(value, {})) if name == "sampler" else {}

    @classmethod
    def execute(
        cls,
        sampler,
        eta=0.0,
        substep_eta=0.5,
        s_noise=1.0,
        bong=True,
        gamma=2.0,
        noise_kind="plain",
        sde_seed=-1,
        follow_seed=False,
    ):
        from ..ltx2_core.sampling.choice import FOLLOW_NOISE_SEED, SamplerChoice

        choice = SamplerChoice(
            sampler,
            eta=eta,
            substep_eta=substep_eta,
            s_noise=s_noise,
            bong=bong,
            gamma=gamma,
            noise_kind=noise_kind,
            sde_seed=FOLLOW_NOISE_SEED if follow_seed else sde_seed,
        )
        return (choice,)


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
            },
            "optional": {
                "noise_layout": COMBO(
                    NOISE_LAYOUTS,
                    "ltx: starting noise as Lightricks' own code draws it on this device. comfy: as ComfyUI draws it on the "
                    "CPU, so that a seed starts from the same noise as there.",
                    advanced=True,
                ),
            },
        }

    @classmethod
    def execute(cls, guider, latent, sigmas, sampler, seed, noise_layout="ltx"):
        from ..ltx2_core.job import SampleJob

        job = SampleJob(
            latent,
            guider.positive,
            guider.negative,
            guider.guidance,
            sigmas,
            sampler,
            seed,
            evaluation=guider.evaluation,
            noise_layout=noise_layout,
        )
        return (guider.model.engine.sample(job),)
