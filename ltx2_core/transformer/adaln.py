"""Timestep embedding and the modulation rows that it gives to every block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import Rows

SINUSOID_DIM = 256


def sinusoid(timesteps: Tensor) -> Tensor:
    """Embed timesteps [...] as [..., 256] float32: cosines first, then sines (ltx-core 1.2)."""
    half = SINUSOID_DIM // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[..., None] * exponent.exp()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class _TimestepEmbedder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_DIM, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class _Embedding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.timestep_embedder = _TimestepEmbedder(dim)


class AdaLN(nn.Module):
    """Timesteps to ``num_rows`` modulation vectors of width ``dim``."""

    def __init__(self, dim: int, num_rows: int):
        super().__init__()
        self.num_rows = num_rows
        self.emb = _Embedding(dim)
        self.linear = nn.Linear(dim, num_rows * dim)

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """timesteps: [B, U] float32, in units of the sinusoid (sigma x 1000).

        Returns the rows [B, U, num_rows, dim] and the embedded timestep [B, U, dim], in the module's dtype.
        """
        embedded = self.emb.timestep_embedder(sinusoid(timesteps).to(self.linear.weight.dtype))
        return self.linear(F.silu(embedded)).unflatten(-1, (self.num_rows, -1)), embedded


@dataclass(frozen=True)
class Modulation:
    """Modulation vectors of all tokens, stored once per distinct timestep.

    rows: [B, U, K, C]. index: [B, T] which of the U timesteps each token has; ``None`` when U is 1.
    """

    rows: Tensor
    index: Tensor | None = None

    def plus(self, table: Tensor) -> Modulation:
        """Add a learned table [K, C]; the table is rounded to the activation dtype first."""
        return Modulation(self.rows + table.to(self.rows.dtype), self.index)

    def row(self, j: int) -> Rows:
        """Vector ``j`` of every token."""
        return Rows(self.rows[:, :, j], self.index)
