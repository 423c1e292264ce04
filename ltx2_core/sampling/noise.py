"""Seeded noise. One generator per use; every draw is made whole, so it does not depend on how tokens are spread."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import wide
from ..av import AV
from ..conditioning.state import LatentState


def generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator on ``device``; the seed counts modulo 2^64, so -1 is 2^64 - 1 as in the reference."""
    return torch.Generator(device).manual_seed(seed % 2**64)


def noised(states: AV[LatentState], noise_scale: float, source: torch.Generator) -> AV[Tensor]:
    """What sampling starts from: each stream's tokens moved towards noise, kept tokens as they are.

    One draw a stream in token layout and latent dtype, video first, conditioning tokens included
    (ltx-core 1.2, GaussianNoiser; both steps in float32).
    """

    def start(state: LatentState) -> Tensor:
        noise = torch.randn(state.latent.shape, generator=source, dtype=state.latent.dtype, device=state.latent.device)
        x, clean = wide(state.latent), wide(state.clean)
        noisy = x + noise_scale * (wide(noise) - x)
        return (clean + state.mask * (noisy - clean)).to(state.latent.dtype)

    return states.map(start)
