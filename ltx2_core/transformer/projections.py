"""Linear layers that read the same tokens, and tokens that come with their eight-bit form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import Quantized, quantize_rows


class Tokens(NamedTuple):
    """Tokens [B, T, C]; rows: the same in eight bits, for layers that read those."""

    plain: Tensor
    rows: Quantized | None = None


def reads_rows(linear: nn.Module) -> bool:
    """Whether a linear layer computes from rows in eight bits."""
    return bool(getattr(linear, "reads_rows", False))


def for_linear(x: Tensor, linear: nn.Module) -> Tokens:
    """Tokens in the form that a linear layer reads."""
    return Tokens(x, quantize_rows(x) if reads_rows(linear) else None)


def apply(linear: nn.Module, tokens: Tokens) -> Tensor:
    """A linear layer's output [B, T, width]."""
    return linear(tokens.plain, tokens.rows) if reads_rows(linear) else linear(tokens.plain)


def project(tokens: Tokens, linears: Sequence[Any]) -> tuple[Tensor, ...]:
    """The outputs [B, T, width of each] of several linear layers for the same tokens.

    One matrix product where their weights and biases lie end to end, as those of a block do whose modules name them in
    ``side_by_side`` (``loading/arena.py``). The outputs are then slices of one tensor, with unit last stride.
    """
    weights = _joint([linear.weight for linear in linears]) if all(type(one) is nn.Linear for one in linears) else None
    biases = None if weights is None else _joint([linear.bias for linear in linears])
    if weights is None or biases is None:
        return tuple(apply(linear, tokens) for linear in linears)
    return F.linear(tokens.plain, weights, biases).split([linear.out_features for linear in linears], dim=-1)


def _joint(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie end to end in one storage as one tensor, concatenated along the first axis; else None."""
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != storage:
            return None
        end += tensor.nbytes
    return first.as_strided((sum(len(tensor) for tensor in tensors), *first.shape[1:]), first.stride())
