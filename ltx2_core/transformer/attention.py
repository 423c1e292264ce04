"""Attention module: projections, query/key norm, rotary, softmax, perturbation, head gates, output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...kernels import head_gate, norm_rotary, qk_norm_rotary, rms_norm
from ..parallel.context import WHOLE, Split
from .heads import KeysValues, SplitKeysValues, attend_among, attend_given
from .projections import Tokens, apply, for_linear, project, reads_rows
from .rope import CrossRotary, Rotary

# Whether an attention is computed: for all samples, for none, or per sample ([B, 1, 1], 1 = computed).
Keep = bool | Tensor


class Attention(nn.Module):
    """Multi-head attention with query and key norms over all heads jointly (ltx-core 1.2).

    query_dim, context_dim: widths of the two inputs; the inner width is ``heads * head_dim``.
    gated: scale every head's output by ``2 * sigmoid(to_gate_logits(x))``. ``fast``: round less often than the reference.
    """

    # weights that lie end to end where a block has one piece of memory
    side_by_side = (("to_q", "to_k", "to_v"),)

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        heads: int,
        head_dim: int,
        *,
        gated: bool,
        eps: float,
    ):
        super().__init__()
        inner = heads * head_dim
        self.heads, self.eps, self.fast = heads, eps, False
        self.to_q = nn.Linear(query_dim, inner)
        self.to_k = nn.Linear(context_dim, inner)
        self.to_v = nn.Linear(context_dim, inner)
        self.q_norm = nn.RMSNorm(inner, eps=eps)
        self.k_norm = nn.RMSNorm(inner, eps=eps)
        self.to_gate_logits = nn.Linear(query_dim, heads) if gated else None
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim)])

    @property
    def reads_rows(self) -> bool:
        """Whether queries are computed from tokens in eight bits."""
        return reads_rows(self.to_q)

    def attend_self(
        self, x: Tokens, rotary: Rotary, *, bias: Tensor | None = None, keep: Keep = True, split: Split = WHOLE
    ) -> Tensor:
        """Attention among tokens [B, T, query_dim]; returns the same shape.

        bias: additive, broadcastable to [B, H, T, T]. keep: where False, the value projection passes in place of the
        attention. split: of the tokens, of which x and rotary are this rank's share; the bias is that of all.
        """
        return self._output(apply(self.to_v, x) if keep is False else self._among(x, rotary, bias, keep, split), x)

    def _among(self, x: Tokens, rotary: Rotary, bias: Tensor | None, keep: Tensor | bool, split: Split) -> Tensor:
        """Self attention before gates and output, [B, T, heads * head_dim]. What it makes goes when it returns."""
        q, k, values = project(x, (self.to_q, self.to_k, self.to_v))
        weights = self.q_norm.weight, self.k_norm.weight
        going = split.ahead("values", values)
        q, k = qk_norm_rotary(q, k, *weights, rotary.cos, rotary.sin, self.eps, fast=self.fast)
        out = attend_among(q, k, going, self.heads, bias, split)
        del q, k
        return out.mul_(keep).add_(values * (1 - keep)) if isinstance(keep, Tensor) else out

    def keys_values(self, context: Tokens, rotary: Rotary | None = None) -> KeysValues:
        """What ``attend_to`` reads of the tokens of a context [B, S, context_dim]."""
        k, values = project(context, (self.to_k, self.to_v))
        return KeysValues(self._normed(k, self.k_norm, rotary), values)

    def keys_values_across(self, context: Tokens, rotary: CrossRotary, split: Split) -> KeysValues:
        """The same of tokens that may be split over ranks, of which ``context`` is this rank's share."""
        late = rotary.full if split.size > 1 and split.context.v2a == "heads_late" else None
        here = self.keys_values(context, None if late else rotary.local)
        return here if split.size == 1 else SplitKeysValues(here.keys, here.values, split, late)

    def attend_to(
        self, context: KeysValues, x: Tokens, rotary: Rotary | None = None, *, bias: Tensor | None = None
    ) -> Tensor:
        """Attention of the tokens x [B, T, query_dim] to others; returns their shape.

        bias: additive, broadcastable to [B, H, T, S].
        """
        out = attend_given(self._normed(apply(self.to_q, x), self.q_norm, rotary), context, self.heads, bias)
        return self._output(out, x)

    def _normed(self, x: Tensor, norm: nn.RMSNorm, rotary: Rotary | None) -> Tensor:
        if rotary is None:
            return rms_norm(x, norm.weight, self.eps)
        return norm_rotary(x, norm.weight, rotary.cos, rotary.sin, self.eps, fast=self.fast)

    def _output(self, out: Tensor, x: Tokens) -> Tensor:
        """Head gates and output projection. out: [B, T, heads * head_dim]; x: the tokens that the gates are read from."""
        linear: Any = self.to_out[0]
        if self.to_gate_logits is None:
            return apply(linear, for_linear(out, linear))
        logits = self.to_gate_logits(x.plain)
        if reads_rows(linear):
            return linear.of_rows(head_gate(out, logits, fast=self.fast, quantize=True), out.dtype)
        return linear(head_gate(out, logits, fast=self.fast))
