"""What the first step would wait for, done before it: fused kernels are compiled and checked at their first use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..av import AV
from ..conditioning.state import LatentState
from .guidance import GuidancePass, StreamGuidance, combine
from .noise import finest_dtype
from .res2s import sde_step

_TOKENS = 64


def warm_up(
    states: AV[LatentState], passes: Sequence[GuidancePass], guidance: AV[StreamGuidance], sampler: str
) -> None:
    """Guidance and the sampler's update on a few tokens, for their kernels; changes nothing."""
    few = states.map(lambda state: some_values(state.latent[:, :_TOKENS]))
    few.map(lambda x, strengths: combine({one.name: x for one in passes}, strengths), guidance)
    if sampler == "res_2s":
        fine = few.map(lambda x: x.to(finest_dtype(x.device)))
        fine.map(lambda x: sde_step(x, x.flip(1), x, sigma=1.0, sigma_next=0.5))


def some_values(like: Tensor) -> Tensor:
    """Values of about unit size and no pattern that a wrong kernel could keep; a contiguous tensor of that form."""
    count = torch.arange(like.numel(), dtype=torch.float32, device=like.device)
    return torch.sin(count * count * 0.37).mul_(1.4).to(like.dtype).view(like.shape)
