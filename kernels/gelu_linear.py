"""A linear layer followed by GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import HALF


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, fast: bool = False) -> Tensor:
    """GELU (tanh form) of ``x @ weight^T + bias``. x: [..., in]; weight: [out, in]; bias: [out] or None.

    The product rounds to x's dtype before the GELU. ``fast`` applies the GELU to the matrix product's float32 sums on a
    GPU, in 16-bit dtypes; elsewhere it changes nothing.
    """
    if not (fast and _has_epilogue(x, weight, bias)):
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    # only CUDA's epilogue is the tanh form
    out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])


def _has_epilogue(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not (x.is_cuda and x.dtype in HALF and x.dim() >= 2 and x.numel() > 0) or torch.version.hip is not None:
        return False
    same = all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in (weight, bias))
    return same and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
