"""The attention call itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, non-causal.

    q: [B, H, Tq, D]; k, v: [B, H, Tk, D]; bias: broadcastable to [B, H, Tq, Tk]. Returns [B, H, Tq, D].
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
