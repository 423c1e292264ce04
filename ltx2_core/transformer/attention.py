"""Attention module: projections, query/key norm, rotary, softmax, perturbation, head gates, output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels import apply_split_rotary
from .attend import attend
from .rope import Rotary

# Whether an attention is computed: for all samples, for none, or per sample ([B, 1, 1], 1 = computed).
Keep = bool | Tensor


class Attention(nn.Module):
    """Multi-head attention with query and key norms over all heads jointly (ltx-core 1.2).

    query_dim, context_dim: widths of the two inputs; the inner width is ``heads * head_dim``.
    gated: scale every head's output by ``2 * sigmoid(to_gate_logits(x))``.
    """

    def __init__(self, query_dim: int, context_dim: int, heads: int, head_dim: int, *, gated: bool, eps: float):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner)
        self.to_k = nn.Linear(context_dim, inner)
        self.to_v = nn.Linear(context_dim, inner)
        self.q_norm = nn.RMSNorm(inner, eps=eps)
        self.k_norm = nn.RMSNorm(inner, eps=eps)
        self.to_gate_logits = nn.Linear(query_dim, heads) if gated else None
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim)])

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        rotary: Rotary | None = None,
        context_rotary: Rotary | None = None,
        bias: Tensor | None = None,
        keep: Keep = True,
    ) -> Tensor:
        """x: [B, T, query_dim]; context: [B, S, context_dim], x itself for self attention. Returns [B, T, query_dim].

        keep: where False, the value projection passes in place of the attention (only meaningful for self attention).
        """
        context = x if context is None else context
        values = self.to_v(context)
        if keep is False:
            out = values
        else:
            out = self._softmax(x, context, values, rotary, context_rotary or rotary, bias)
            if isinstance(keep, Tensor):
                out = out * keep + values * (1 - keep)
        if self.to_gate_logits is not None:
            gates = 2 * torch.sigmoid(self.to_gate_logits(x))
            out = (out.unflatten(-1, (self.heads, -1)) * gates[..., None]).flatten(2)
        return self.to_out[0](out)

    def _softmax(
        self,
        x: Tensor,
        context: Tensor,
        values: Tensor,
        rotary: Rotary | None,
        context_rotary: Rotary | None,
        bias: Tensor | None,
    ) -> Tensor:
        q = self._heads_first(self.q_norm(self.to_q(x)))
        k = self._heads_first(self.k_norm(self.to_k(context)))
        if rotary is not None and context_rotary is not None:
            q = apply_split_rotary(q, rotary.cos, rotary.sin)
            k = apply_split_rotary(k, context_rotary.cos, context_rotary.sin)
        out = attend(q, k, self._heads_first(values), bias)
        return out.transpose(1, 2).flatten(2)

    def _heads_first(self, x: Tensor) -> Tensor:
        """[B, T, H * D] -> [B, H, T, D]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
