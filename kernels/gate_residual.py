"""Add a gated branch to the residual stream."""

from __future__ import annotations

from torch import Tensor


def gate_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Return ``x + branch * gate``; x, branch: [B, T, C], gate: [B, T, C] or [B, 1, C]. Product and sum round in turn."""
    return x + branch * gate
