"""Guidance as values: its strengths, the passes that they need, and how passes combine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ...kernels import guidance_combine
from ..av import AV


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamGuidance:
    """Guidance strengths of one modality.

    cfg: classifier-free guidance, 1 = off. stg: spatio-temporal guidance, 0 = off; it skips self attention in
    ``stg_blocks``. modality: guidance against the prediction without the other stream, 1 = off.
    rescale: how far the result is pulled back to the contrast of the plain prediction, 0 = off.
    skip_step: how many steps after each evaluated one keep its result, 0 = evaluate every step.
    """

    cfg: float = 1.0
    stg: float = 0.0
    modality: float = 1.0
    rescale: float = 0.0
    stg_blocks: tuple[int, ...] = ()
    skip_step: int = 0

    def __post_init__(self):
        for name in ("cfg", "stg", "modality", "rescale"):
            value = getattr(self, name)
            if not math.isfinite(value) or abs(value) > 1000:
                raise ValueError(f"{name} must be a number from -1000 to 1000, found {value}")
        if not 0 <= self.skip_step <= 100:
            raise ValueError(f"skip_step must be a whole number from 0 to 100, found {self.skip_step}")

    def skips(self, step: int) -> bool:
        """Whether this modality keeps its last result at ``step``; step 0 is always evaluated."""
        return self.skip_step != 0 and step % (self.skip_step + 1) != 0

    def without_modality(self) -> StreamGuidance:
        return replace(self, modality=1.0)

    @property
    def uses_cfg(self) -> bool:
        return not math.isclose(self.cfg, 1.0)

    @property
    def uses_stg(self) -> bool:
        """A strength without blocks would spend a pass and change nothing."""
        return not math.isclose(self.stg, 0.0) and bool(self.stg_blocks)

    @property
    def uses_modality(self) -> bool:
        return not math.isclose(self.modality, 1.0)


@dataclass(frozen=True, slots=True)
class GuidancePass:
    """One evaluation of the model: which prompt, and which attentions are skipped."""

    name: str
    negative: bool = False
    skip_video_self_attn_blocks: tuple[int, ...] = ()
    skip_audio_self_attn_blocks: tuple[int, ...] = ()
    disable_a2v_cross_attn: bool = False
    disable_v2a_cross_attn: bool = False


def plan_passes(guidance: AV[StreamGuidance], *, force_uncond: bool = False) -> tuple[GuidancePass, ...]:
    """The passes that the strengths of both modalities need, in the reference's order (ltx-core 1.2).

    force_uncond: run the pass of the negative prompt also where no strength asks for it (CFG++).
    """
    streams = tuple(guidance.present())
    passes = [GuidancePass("cond")]
    if force_uncond or any(s.uses_cfg for s in streams):
        passes.append(GuidancePass("uncond", negative=True))
    if any(s.uses_stg for s in streams):
        blocks = guidance.map(lambda s: s.stg_blocks if s.uses_stg else ())
        passes.append(
            GuidancePass(
                "perturbed",
                skip_video_self_attn_blocks=blocks.video or (),
                skip_audio_self_attn_blocks=blocks.audio or (),
            )
        )
    if any(s.uses_modality for s in streams):
        passes.append(GuidancePass("isolated", disable_a2v_cross_attn=True, disable_v2a_cross_attn=True))
    return tuple(passes)


def combine(predictions: Mapping[str, Tensor], guidance: StreamGuidance) -> Tensor:
    """One modality's guided x0 from the x0 predictions [B, T, C] of the passes that ran, by name."""
    return guidance_combine(
        predictions["cond"],
        predictions.get("uncond"),
        predictions.get("perturbed"),
        predictions.get("isolated"),
        cfg=guidance.cfg,
        stg=guidance.stg if guidance.uses_stg else 0.0,
        modality=guidance.modality,
        rescale=guidance.rescale,
    )


# Up to about this many video tokens a pass costs less than reading the weights for it, so passes share one call.
BATCHED_TOKENS = 1024


def evaluation_mode(choice: str, num_passes: int, num_video_tokens: int, *, batched_fits: bool = True) -> str:
    """``split`` or ``batched`` from the user's choice, which may be ``auto``.

    Split passes share what they have in common and skip what they disable; batched ones read the weights once and take
    the memory of all passes, which they may not have (``batched_fits``).
    """
    if choice != "auto":
        return choice
    return "batched" if num_passes > 1 and num_video_tokens <= BATCHED_TOKENS and batched_fits else "split"
