"""The sizes of one stage of sampling, as its work space and its division over ranks follow from them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .av import AV
from .conditioning.state import LatentState
from .job import SampleJob
from .shapes import ClipShape


@dataclass(frozen=True)
class Stage:
    """clip: what is made. tokens: of one sample in each stream, those of conditions included. batch: samples.

    levels: distinct values of each stream's mask. biased: which streams' self attention has weights. text_tokens: of the
    longer prompt.
    """

    clip: ClipShape
    tokens: AV[int]
    batch: int
    levels: AV[int]
    biased: AV[bool]
    text_tokens: int

    @classmethod
    def of(cls, job: SampleJob, states: AV[LatentState]) -> Stage:
        def count_levels(state: LatentState) -> int:
            return len(state.mask.unique())

        contexts = [context for context in (job.positive, job.negative) if context is not None]
        features: list[Tensor] = [part for context in contexts for part in context.features.present()]
        return cls(
            job.latent.clip,
            tokens=states.map(lambda state: state.latent.shape[1]),
            batch=next(states.present()).latent.shape[0],
            levels=states.map(count_levels),
            biased=states.map(lambda state: state.attention_mask is not None),
            text_tokens=max(part.shape[1] for part in features),
        )

    def tokens_of(self, clip: ClipShape) -> AV[int]:
        """Tokens of another clip with the same conditions."""
        ours, others = (AV(one.num_video_tokens, one.audio_latents) for one in (self.clip, clip))
        return self.tokens.map(lambda count, own, other: count - own + other, ours, others)
