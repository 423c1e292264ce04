"""RMS-normalise tokens and apply the AdaLN scale and shift."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Return ``rms_norm(x) * (1 + scale) + shift``.

    x: [B, T, C]; scale, shift: [B, T, C] or [B, 1, C]. Each operation rounds to x's dtype, as ltx-core 1.2 does.
    """
    return F.rms_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
