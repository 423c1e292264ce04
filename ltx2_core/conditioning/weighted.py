"""How strongly the clip looks at a keyframe or reference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..av import AV
from ..shapes import ClipShape
from .attention import extended_mask, token_weights
from .checks import check_share
from .condition import Condition, Encoders
from .masks import check_mask
from .pixels import visible_part
from .state import LatentState


@runtime_checkable
class Pictures(Condition, Protocol):
    """A condition that adds the tokens of pictures: frames [N, H, W, 3], of which ``selected`` are encoded."""

    @property
    def frames(self) -> Tensor: ...

    def grid(self, clip: ClipShape) -> tuple[int, int, int]: ...

    def selected(self, clip: ClipShape) -> list[int]: ...


@dataclass(frozen=True)
class AttentionStrength:
    """Let the clip look at what a condition adds with a weight.

    inner: a condition that adds tokens (keyframe, reference).
    strength: 1 looks fully, 0 not at all.
    mask: [M, h, w] in 0..1, shaped like the inner condition's frames (M may be 1): the share of ``strength`` at each
    pixel; averaged over what a latent cell covers, the first frame by itself, then groups of 8.
    """

    inner: Condition
    strength: float
    mask: Tensor | None = field(default=None, repr=False)

    @property
    def stream(self) -> str:
        return self.inner.stream

    @property
    def label(self) -> str:
        return self.inner.label

    def check(self, clip: ClipShape) -> None:
        check_share(f"the attention strength of {self.label}", self.strength)
        self.inner.check(clip)
        if self.inner.writes(clip):
            raise ValueError(f"an attention strength is for keyframes and references; {self.label} adds no tokens")
        if self.mask is not None:
            if not isinstance(self.inner, Pictures):
                raise ValueError(f"an attention mask is for pictures; {self.label} takes only a strength")
            check_mask(f"the attention mask of {self.label}", self.mask, self.inner.frames)

    def writes(self, clip: ClipShape) -> range:
        return self.inner.writes(clip)

    def apply(self, states: AV[LatentState], clip: ClipShape, encoders: Encoders) -> AV[LatentState]:
        if self.strength == 1 and self.mask is None:
            return self.inner.apply(states, clip, encoders)
        before = getattr(states, self.stream)
        states = self.inner.apply(states, clip, encoders)
        after = getattr(states, self.stream)
        batch, existing = before.latent.shape[:2]
        weights = self._weights(clip, after.latent.shape[1] - existing).to(after.latent)
        mask = extended_mask(before.attention_mask, before.num_target, existing, weights.expand(batch, -1))
        return replace(states, **{self.stream: replace(after, attention_mask=mask)})

    def _weights(self, clip: ClipShape, count: int) -> Tensor:
        if self.mask is None:
            return torch.full((count,), self.strength)
        assert isinstance(self.inner, Pictures), "checked before"
        mask = self.mask if len(self.mask) == 1 else self.mask[self.inner.selected(clip)]
        return token_weights(visible_part(mask, clip.height, clip.width), self.inner.grid(clip), self.strength)
