"""Rotary position tables: positions of tokens to cosines and sines, in split form.

Formulas: ltx-core 1.2, `LTXRopeType.SPLIT` with the frequency grid in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of one set of tokens, each [B, H, T, head_dim / 2] in the model's dtype."""

    cos: Tensor
    sin: Tensor

    def first(self, tokens: int) -> Rotary:
        """Those of the first ``tokens`` tokens."""
        return Rotary(self.cos[:, :, :tokens], self.sin[:, :, :tokens])


@dataclass(frozen=True)
class CrossRotary:
    """Tables of audio-video attention, made once of the same positions, so that no rank asks another for them.

    local: of the tokens that this rank has. full: of all tokens of the stream. Without a split both are one object.
    """

    local: Rotary
    full: Rotary

    @classmethod
    def whole(cls, table: Rotary) -> CrossRotary:
        return cls(table, table)

    def first(self, tokens: int) -> CrossRotary:
        """Those of the first ``tokens`` tokens."""
        return CrossRotary.whole(self.local.first(tokens))


def rotary_table(
    positions: Tensor,
    *,
    dim: int,
    heads: int,
    max_pos: Sequence[int],
    theta: float,
    double_precision: bool,
    dtype: torch.dtype,
) -> Rotary:
    """Build the tables of tokens at the midpoints of their bounds.

    positions: [B, axes, T, 2] float32, the bounds [start, end) of each token on each axis.
    dim: width that the heads share; max_pos: the end of each axis, in the units of ``positions``.

    Heads differ: consecutive frequencies go to consecutive heads, so head 0 turns slowest.
    """
    axes = positions.shape[1]
    count = dim // (2 * axes)
    weights = torch.from_numpy(_frequencies(count, theta, double_precision)).to(positions.device)
    middle = (positions[..., 0] + positions[..., 1]) / 2
    limits = positions.new_tensor(max_pos).view(1, axes, 1)
    relative = (2 * (middle / limits) - 1).transpose(1, 2)  # [B, T, axes]
    angles = (weights[:, None] * relative[:, :, None, :]).flatten(2)  # frequency major, axis minor
    cos, sin = _pad_identity(angles.cos(), angles.sin(), dim // 2)
    return Rotary(_split_heads(cos, heads).to(dtype), _split_heads(sin, heads).to(dtype))


def _frequencies(count: int, theta: float, double_precision: bool) -> np.ndarray:
    """theta^(i / (n - 1)) * pi / 2 for i in 0..n-1, rounded once to float32.

    In float32 the powers differ by up to 4e-7 relative, which moves cosines of late tokens by up to 4e-3.
    """
    kind = np.float64 if double_precision else np.float32
    exponents = np.linspace(0.0, 1.0, count, dtype=kind)
    return (np.power(kind(theta), exponents) * kind(math.pi / 2)).astype(np.float32)


def _pad_identity(cos: Tensor, sin: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Fill up to ``width`` in front with rotations by zero."""
    pad = (width - cos.shape[-1], 0)
    return torch.nn.functional.pad(cos, pad, value=1.0), torch.nn.functional.pad(sin, pad, value=0.0)


def _split_heads(table: Tensor, heads: int) -> Tensor:
    """[B, T, dim / 2] -> [B, H, T, head_dim / 2]"""
    return table.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()
