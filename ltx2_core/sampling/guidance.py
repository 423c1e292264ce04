"""Guidance as values: its strengths, the passes that they need, and how passes combine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...kernels import guidance_combine
from ..av import AV


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamGuidance:
    """Guidance strengths of one modality.

    cfg: classifier-free guidance, 1 = off. stg: spatio-temporal guidance, 0 = off; it skips self attention in
    ``stg_blocks``. modality: guidance against the prediction without the other stream, 1 = off.
    rescale: how far the result is pulled back to the contrast of the plain prediction, 0 = off.
    """

    cfg: float = 1.0
    stg: float = 0.0
    modality: float = 1.0
    rescale: float = 0.0
    stg_blocks: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("cfg", "stg", "modality", "rescale"):
            value = getattr(self, name)
            if not math.isfinite(value) or abs(value) > 1000:
                raise ValueError(f"{name} must be a number from -1000 to 1000, found {value}")

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


def plan_passes(guidance: AV[StreamGuidance]) -> tuple[GuidancePass, ...]:
    """The passes that the strengths of both modalities need, in the reference's order (ltx-core 1.2)."""
    streams = tuple(guidance.present())
    passes = [GuidancePass("cond")]
    if any(s.uses_cfg for s in streams):
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
