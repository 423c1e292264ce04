"""Split rotary position embedding, alone or after the norm of queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import CLOSE, EXACT
from .dispatch import demand, demand_like, operation, power_of_two
from .precision import rounded_once

WIDEST = 8192
_SAMPLE = 256


def _twin_of_rotary() -> Callable:
    from .rotary_triton import apply_split_rotary

    return apply_split_rotary


def _twin_of_norm() -> Callable:
    from .rotary_triton import norm_rotary

    return norm_rotary


def _twin_of_both() -> Callable:
    from .rotary_triton import qk_norm_rotary

    return qk_norm_rotary


def _demand_tables(cos: Tensor, sin: Tensor, batch: int, tokens: int) -> tuple[int, int]:
    """Heads and half of their width."""
    demand(cos.dim() == 4 and cos.shape == sin.shape and cos.stride() == sin.stride(), "tables of different shapes")
    demand(cos.shape[0] in (1, batch) and cos.shape[2] == tokens, "shape of the tables")
    heads, half = cos.shape[1], cos.shape[3]
    demand(power_of_two(heads) and power_of_two(half) and 2 * heads * half <= WIDEST, "heads not a power of two")
    return heads, half


def _fit_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, fast: bool = False) -> Hashable:
    demand(x.dim() == 4 and x.numel() > 0, "shape")
    batch, heads, tokens, width = x.shape
    demand(_demand_tables(cos, sin, batch, tokens) == (heads, width / 2), "shape of the tables")
    demand_like(x, cos, sin)
    return heads, width, fast


def _fit_norm(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, fast: bool = False) -> Hashable:
    demand(x.dim() == 3 and x.numel() > 0 and weight.shape == x.shape[2:], "shape")
    heads, half = _demand_tables(cos, sin, *x.shape[:2])
    demand(2 * heads * half == x.shape[2], "shape of the tables")
    demand_like(x, weight, cos, sin)
    return heads, half, fast


def _fit_both(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    fast: bool = False,
) -> Hashable:
    demand(k.shape == q.shape, "shape")
    demand_like(q, k)
    _fit_norm(k, k_weight, cos, sin, eps, fast=fast)
    return _fit_norm(q, q_weight, cos, sin, eps, fast=fast)


def _sample_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, fast: bool = False) -> tuple[tuple, dict]:
    return tuple(t[:, :, :_SAMPLE] for t in (x, cos, sin)), {"fast": fast}


def _sample_norm(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, fast: bool = False
) -> tuple[tuple, dict]:
    return (x[:, :_SAMPLE], weight, cos[:, :, :_SAMPLE], sin[:, :, :_SAMPLE], eps), {"fast": fast}


def _sample_both(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    fast: bool = False,
) -> tuple[tuple, dict]:
    few = cos[:, :, :_SAMPLE], sin[:, :, :_SAMPLE]
    return (q[:, :_SAMPLE], k[:, :_SAMPLE], q_weight, k_weight, *few, eps), {"fast": fast}


@operation(twin=_twin_of_rotary, fit=_fit_rotary, sample=_sample_rotary, contract=EXACT)
def apply_split_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, fast: bool = False) -> Tensor:
    """Rotate the first half of each head against the second half.

    x: [B, H, T, D]; cos, sin: broadcastable to [B, H, T, D / 2], in x's dtype. Returns x's dtype.

    Rounding follows ltx-core 1.2: the product with the cosine is rounded to x's dtype, the rest of the
    multiply-add is computed in float32 and rounded once. ``fast`` does not round the product.
    """
    return (rounded_once(_rotated) if fast else _rotated)(x, cos, sin)


@operation(twin=_twin_of_norm, fit=_fit_norm, sample=_sample_norm, contract=CLOSE)
def norm_rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, fast: bool = False) -> Tensor:
    """RMS norm over all heads jointly, then the rotation of each head.

    x: [B, T, H * D], any strides with unit last stride; weight: [H * D]; cos, sin: [B or 1, H, T, D / 2]. Returns
    [B, T, H * D], contiguous. The norm rounds once, weight included (torch's rms_norm), the rotation as
    ``apply_split_rotary``; ``fast`` rounds at the end only.
    """
    return (rounded_once(_normed) if fast else _normed)(x, weight, cos, sin, eps)


@operation(twin=_twin_of_both, fit=_fit_both, sample=_sample_both, contract=CLOSE)
def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    fast: bool = False,
) -> tuple[Tensor, Tensor]:
    """``norm_rotary`` of the queries and keys of self attention, which have the same positions.

    q, k: [B, T, H * D], any strides with unit last stride: they may be parts of one projection.
    """
    define = norm_rotary.definition
    return define(q, q_weight, cos, sin, eps, fast=fast), define(k, k_weight, cos, sin, eps, fast=fast)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (
            torch.addcmul(first * cos, second, sin, value=-1),
            torch.addcmul(second * cos, first, sin),
        ),
        dim=-1,
    )


def _normed(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], weight, eps)
    heads_first = normed.unflatten(-1, (cos.shape[1], -1)).transpose(1, 2)
    return _rotated(heads_first, cos, sin).transpose(1, 2).flatten(2).contiguous()
