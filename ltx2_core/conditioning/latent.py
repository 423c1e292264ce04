"""The latent that travels between nodes: a clip's shape, its content so far, and what it is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..av import AV
from ..shapes import ClipShape

if TYPE_CHECKING:
    from torch import Tensor

    from .image import ImageCondition


@dataclass(frozen=True)
class AVLatent:
    """Latents of a clip, on the CPU.

    latents: video [B, C, F, H, W] and audio [B, C, T, M], normalised; an absent one starts from nothing.
    masks: share of each latent cell to generate, [B, 1, F, H, W] and [B, 1, T, 1]; absent = generate everything.
    """

    clip: ClipShape
    latents: AV[Tensor] = field(default_factory=AV, repr=False)
    masks: AV[Tensor] = field(default_factory=AV, repr=False)
    conditions: tuple[ImageCondition, ...] = field(default=(), repr=False)

    def with_condition(self, condition: ImageCondition) -> AVLatent:
        return replace(self, conditions=(*self.conditions, condition))
