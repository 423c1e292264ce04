"""Linear layers that read the same tokens, and tokens that come with their eight-bit form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import Quantized, fp8_linear, quantize_rows


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


def apply(linear: Any, tokens: Tokens) -> Tensor:
    """A linear layer's output [B, T, width]."""
    if tokens.rows is not None and reads_rows(linear):
        return linear.of_rows(tokens.rows, tokens.plain.dtype)
    return linear(tokens.plain)


def project(tokens: Tokens, linears: Sequence[Any]) -> tuple[Tensor, ...]:
    """The outputs [B, T, width of each] of several linear layers for the same tokens.

    One matrix product where their weights and biases lie end to end, as those of a block do whose modules name them in
    ``side_by_side`` (``loading/arena.py``). The outputs are then slices of one tensor, with unit last stride.
    """
    together = _in_eight_bits(tokens, linears) if all(map(reads_rows, linears)) else _in_one(tokens, linears)
    if together is None:
        return tuple(apply(linear, tokens) for linear in linears)
    return together.split([len(linear.bias) for linear in linears], dim=-1)


def _in_one(tokens: Tokens, linears: Sequence[Any]) -> Tensor | None:
    """The outputs side by side, from weights that lie end to end; else None."""
    if not all(type(one) is nn.Linear for one in linears):
        return None
    weights, biases = (_joint([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    return None if weights is None or biases is None else F.linear(tokens.plain, weights, biases)


def _in_eight_bits(tokens: Tokens, linears: Sequence[Any]) -> Tensor | None:
    """The same for layers that read rows in eight bits."""
    factors = [linear.packed.factor() for linear in linears]
    if any(len(one.scale) != len(one.data) for one in factors):
        return None  # one scale for a whole weight, or none
    data, scales = _joint([one.data for one in factors]), _joint([one.scale for one in factors])
    biases = _joint([linear.bias for linear in linears])
    if data is None or scales is None or biases is None:
        return None
    rows = tokens.plain if tokens.rows is None else tokens.rows
    return fp8_linear(rows, Quantized(data, scales), biases, tokens.plain.dtype)


def _joint(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors that lie end to end in one storage as one tensor, concatenated along the first axis; else None."""
    first = tensors[0]
    if first is None or torch.compiler.is_compiling():
        return None  # the compiler does not see where tensors lie
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    rows = 0
    for tensor in tensors:
        if tensor is None or tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != storage:
            return None
        rows, end = rows + len(tensor), end + tensor.nbytes
    return first.as_strided((rows, *first.shape[1:]), first.stride())
