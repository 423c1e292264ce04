"""What one evaluation of the transformer needs: per stream, and which attentions it skips."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..av import AV
from ..parallel.context import WHOLE, Split
from .attention import Keep
from .rope import CrossRotary, Rotary


@dataclass(frozen=True)
class Timesteps:
    """Noise levels of one stream's tokens, each distinct level stored once.

    rows: [B, U] float32 in [0, 1], the distinct levels (mask value x sigma).
    index: [B, T] int64 into the rows, ``None`` when U is 1.
    sigma: [B] float32, the stream's own level; 0 for a stream that is held fixed.
    """

    rows: Tensor
    index: Tensor | None
    sigma: Tensor

    def first(self, tokens: int) -> Timesteps:
        """Those of the first ``tokens`` tokens."""
        return self if self.index is None else replace(self, index=self.index[:, :tokens])


@dataclass(frozen=True)
class StreamInput:
    """One stream's half of an evaluation.

    latent: [B, T, C] tokens, in the model's dtype. context: [B, S, context_dim] text tokens.
    rotary, cross_rotary: tables of self attention and of audio-video attention for these tokens.
    attention_bias: additive, broadcastable to [B, H, T, T]; context_bias: additive, to [B, H, T, S].
    keyframes_mask: [B, T, 1], nonzero on tokens of a latent frame that encodes one pixel frame.
    enabled: False leaves this stream's tokens as they are; the other stream still reads them.
    split: how the stream lies on ranks (``parallel/sequence.py``); T is a rank's share then, but in ``attention_bias``.
    """

    latent: Tensor
    timesteps: Timesteps
    context: Tensor
    rotary: Rotary
    cross_rotary: CrossRotary
    attention_bias: Tensor | None = None
    context_bias: Tensor | None = None
    keyframes_mask: Tensor | None = None
    enabled: bool = True
    split: Split = WHOLE

    def first(self, tokens: int) -> StreamInput:
        """The first ``tokens`` tokens that are here, which attend to each other and to as many of the text."""
        bias, text_bias, marks = self.attention_bias, self.context_bias, self.keyframes_mask
        latent = self.latent[:, :tokens]
        here = latent.shape[1]
        return replace(
            self,
            latent=latent,
            timesteps=self.timesteps.first(tokens),
            context=self.context[:, :tokens],
            rotary=self.rotary.first(tokens),
            cross_rotary=self.cross_rotary.first(tokens),
            attention_bias=None if bias is None else bias[..., :here, :here],
            context_bias=None if text_bias is None else text_bias[..., :tokens, :tokens],
            keyframes_mask=None if marks is None else marks[:, :tokens],
            split=WHOLE,
        )


def besides_text(inputs: AV[StreamInput]) -> Hashable:
    """What these hold besides the prompt, by identity: equal for passes that are alike until they read their prompts."""
    kept = [field.name for field in fields(StreamInput) if field.name not in ("context", "context_bias")]
    return tuple(
        None if one is None else tuple(id(getattr(one, name)) for name in kept) for one in (inputs.video, inputs.audio)
    )


@dataclass(frozen=True)
class Perturbation:
    """Which attentions one sample skips. Blocks are indices; the cross attentions are skipped in all blocks."""

    skip_video_self_attn_blocks: tuple[int, ...] = ()
    skip_audio_self_attn_blocks: tuple[int, ...] = ()
    disable_a2v_cross_attn: bool = False
    disable_v2a_cross_attn: bool = False

    def keeps(self, block: int) -> tuple[bool, bool, bool, bool]:
        """Video self, audio self, audio-to-video and video-to-audio attention of one block."""
        return (
            block not in self.skip_video_self_attn_blocks,
            block not in self.skip_audio_self_attn_blocks,
            not self.disable_a2v_cross_attn,
            not self.disable_v2a_cross_attn,
        )


@dataclass(frozen=True)
class Pass:
    """One pass of a split evaluation: its inputs and what it skips. Passes with the same inputs share the object, and those
    that differ in the prompt share what else is in it."""

    inputs: AV[StreamInput]
    perturbation: Perturbation = Perturbation()


@dataclass(frozen=True)
class BlockKeep:
    """Which attentions one block computes. ``cross`` is named after the stream that it writes to."""

    self_attn: AV[Keep]
    cross: AV[Keep]


def plan_keeps(
    perturbations: Sequence[Perturbation], num_blocks: int, device: torch.device, dtype: torch.dtype
) -> tuple[BlockKeep, ...]:
    """What every block computes for a batch with one perturbation per sample.

    Where samples agree the answer is a plain bool; only mixed ones cost a mask [B, 1, 1]. Built once per run, since
    moving a mask to the device waits for it.
    """
    masks: dict[tuple[bool, ...], Tensor] = {}

    def merge(wanted: tuple[bool, ...]) -> Keep:
        if all(wanted) or not any(wanted):
            return wanted[0]
        if wanted not in masks:
            masks[wanted] = torch.tensor(wanted, device=device).to(dtype).view(-1, 1, 1)
        return masks[wanted]

    plan = []
    for block in range(num_blocks):
        video, audio, to_video, to_audio = (
            merge(kinds) for kinds in zip(*(p.keeps(block) for p in perturbations), strict=True)
        )
        plan.append(BlockKeep(AV(video, audio), AV(to_video, to_audio)))
    return tuple(plan)
