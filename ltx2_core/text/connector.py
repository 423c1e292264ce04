"""Connectors: text features to the context that the transformer attends to.

Formulas: ltx-core 1.2, Embeddings1DConnector.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import apply_split_rotary
from ..config.text import ConnectorConfig

# The models were trained on contexts of this length; a shorter one has fewer registers and means something else.
MIN_TOKENS = 1024

_EPS = 1e-6


class Connector(nn.Module):
    """A small bidirectional transformer over a prompt's features, with learned registers behind the prompt."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.config = config
        self.learnable_registers = nn.Parameter(torch.empty(config.num_registers, config.dim))
        self.transformer_1d_blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """features: [B, S, C]; mask: [B, S], True at tokens, padding anywhere.

        Returns [B, T, C] with every position meaningful: T is 1024, or the next multiple of the register count above
        S when S is larger.
        """
        x = self._fill_with_registers(features, mask.bool())
        cos, sin = _rotary_table(x, self.config)
        for block in self.transformer_1d_blocks:
            x = block(x, cos, sin)
        return _rms_norm(x)

    def _fill_with_registers(self, features: Tensor, mask: Tensor) -> Tensor:
        """Move the tokens to the front, in order; position p behind them takes register p mod R."""
        count = self.config.num_registers
        repeats = -(-max(features.shape[1], MIN_TOKENS) // count)
        order = torch.argsort(mask.logical_not().byte(), dim=1, stable=True)
        packed = features.gather(1, order[..., None].expand_as(features))
        packed = F.pad(packed, (0, 0, 0, repeats * count - features.shape[1]))
        is_token = torch.arange(repeats * count, device=features.device) < mask.sum(dim=1, keepdim=True)
        registers = self.learnable_registers.to(features.dtype).repeat(repeats, 1)
        return torch.where(is_token[..., None], packed, registers)


class _Block(nn.Module):
    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.attn1 = _Attention(config)
        self.ff = _FeedForward(config.dim, config.ff_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn1(_rms_norm(x), cos, sin)
        return x + self.ff(_rms_norm(x))


class _Attention(nn.Module):
    """Self attention over all positions; query and key norms span all heads together."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.heads = config.heads
        self.to_q = nn.Linear(config.dim, config.dim)
        self.to_k = nn.Linear(config.dim, config.dim)
        self.to_v = nn.Linear(config.dim, config.dim)
        self.q_norm = nn.RMSNorm(config.dim, eps=_EPS)
        self.k_norm = nn.RMSNorm(config.dim, eps=_EPS)
        self.to_gate_logits = nn.Linear(config.dim, config.heads) if config.gated else None
        self.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim)])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = apply_split_rotary(self._heads_first(self.q_norm(self.to_q(x))), cos, sin)
        k = apply_split_rotary(self._heads_first(self.k_norm(self.to_k(x))), cos, sin)
        out = F.scaled_dot_product_attention(q, k, self._heads_first(self.to_v(x))).transpose(1, 2)
        if self.to_gate_logits is not None:
            out = out * (2 * torch.sigmoid(self.to_gate_logits(x)))[..., None]
        return self.to_out[0](out.flatten(2))

    def _heads_first(self, x: Tensor) -> Tensor:
        """[B, T, H * D] -> [B, H, T, D]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, bias: bool):
        super().__init__()
        self.net = nn.ModuleList([_GELULinear(dim, 4 * dim, bias), nn.Identity(), nn.Linear(4 * dim, dim, bias=bias)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class _GELULinear(nn.Module):
    def __init__(self, dim: int, inner: int, bias: bool):
        super().__init__()
        self.proj = nn.Linear(dim, inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=_EPS)


def _rotary_table(x: Tensor, config: ConnectorConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0..T-1, each [H, T, head_dim / 2], in x's dtype as ltx-core has them.

    Consecutive frequencies go to consecutive heads, so head 0 turns slowest.
    """
    half = config.dim // 2
    kind = torch.float64 if config.double_precision else torch.float32
    frequencies = config.rope_theta ** torch.linspace(0, 1, half, dtype=kind) * (math.pi / 2)
    relative = 2 * (torch.arange(x.shape[1], device=x.device, dtype=torch.float32) / config.max_pos) - 1
    angles = relative[:, None] * frequencies.float().to(x.device)
    angles = angles.unflatten(-1, (config.heads, -1)).transpose(0, 1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
