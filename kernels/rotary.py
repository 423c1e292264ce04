"""Split rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_split_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first half of each head against the second half.

    x: [B, H, T, D]; cos, sin: broadcastable to [B, H, T, D / 2], in x's dtype. Returns x's dtype.

    Rounding follows ltx-core 1.2: the product with the cosine is rounded to x's dtype, the rest of the
    multiply-add is computed in float32 and rounded once.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (
            torch.addcmul(first * cos, second, sin, value=-1),
            torch.addcmul(second * cos, first, sin),
        ),
        dim=-1,
    )
