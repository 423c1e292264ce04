"""Softmax attention of all heads, for tokens that this rank has and for tokens that are split over ranks.

Split over P ranks (Ulysses): each rank gets all tokens of its H / P heads, attends, and hands tokens back. Queries and keys
are normed before, over all heads, and rotated before, with the tables of their own tokens.

Queries that every rank has read split keys in one of three ways (``ParallelContext.v2a``):

partial: every rank attends, all heads, to its own keys; one exchange of results and log-sum-exps, and the same merge on all
    ranks. A fraction of the bytes; equal in exact arithmetic.
heads: keys and values to all tokens of a rank's heads, results back: the bits of one rank.
heads_late: the same with keys that are rotated behind the exchange, by the tables of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...kernels import apply_split_rotary
from ..parallel.context import WHOLE, Ahead, Split
from .attend import attend, attend_part
from .rope import Rotary


@dataclass(frozen=True)
class KeysValues:
    """What queries attend to: normed and rotated keys, and values, each [B, S, heads * head_dim]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class SplitKeysValues(KeysValues):
    """The same of this rank's share of tokens. late: tables of all tokens, for keys that are not rotated yet."""

    split: Split
    late: Rotary | None


def attend_among(
    q: Tensor, k: Tensor, v: Tensor | Ahead, heads: int, bias: Tensor | None, split: Split = WHOLE
) -> Tensor:
    """Attention among tokens [B, T, heads * head_dim], all of them or this rank's share; returns the same shape.

    v: may be on its way to other ranks (``Split.ahead``). The result may lie in memory that the next exchange overwrites.
    bias: additive, broadcastable to [B, H, T, T] of the whole sequence.
    """
    if bias is not None and bias.shape[1] > 1:
        bias = split.own_heads(bias, 1)
    q, k, v = split.to_heads(split.ahead("queries", q), split.ahead("keys", k), v)
    return split.to_tokens(_softmax(q, k, v, heads // split.size, bias))


def attend_given(q: Tensor, given: KeysValues, heads: int, bias: Tensor | None = None) -> Tensor:
    """Attention of queries [B, T, heads * head_dim] to what they are given; returns their shape.

    bias: additive, broadcastable to [B, H, T, S]; None for keys that are split over ranks.
    """
    if isinstance(given, SplitKeysValues):
        assert bias is None, "keys that are split over ranks have no bias"
        return _ATTEND_SPLIT[given.split.context.v2a](q, given, heads)
    return _softmax(q, given.keys, given.values, heads, bias)


def _by_heads(q: Tensor, given: SplitKeysValues, heads: int) -> Tensor:
    split, own = given.split, heads // given.split.size
    k, v = split.to_heads(given.keys, given.values)
    if given.late is not None:
        k = _rotated(k, Rotary(split.own_heads(given.late.cos, 1), split.own_heads(given.late.sin, 1)))
    return split.gather_heads(_softmax(split.own_heads(q, 2), k, v, own, None))


def _by_parts(q: Tensor, given: SplitKeysValues, heads: int) -> Tensor:
    split = given.split
    # fillers are not keys
    k, v = given.keys[:, : split.valid], given.values[:, : split.valid]
    parts = split.gather_parts(*attend_part(*(_apart(x, heads) for x in (q, k, v))))
    return merge_parts(*parts).transpose(1, 2).flatten(2)


_ATTEND_SPLIT: Mapping[str, Callable[[Tensor, SplitKeysValues, int], Tensor]] = {
    "partial": _by_parts,
    "heads": _by_heads,
    "heads_late": _by_heads,
}


def merge_parts(outs: Tensor, sums: Tensor) -> Tensor:
    """Attention to all keys from attention to parts of them: the softmax's weights of a part are its share of the sum.

    outs: [P, B, H, T, D]; sums: [P, B, H, T] log-sum-exp of the scaled scores, -inf for a part without keys, whose ``outs``
    are zero. Computed in the dtype of ``sums`` in the order of ranks. Returns [B, H, T, D] in the dtype of ``outs``.
    """
    weights = (sums - sums.amax(0)).exp()[..., None]
    return ((weights * outs).sum(0) / weights.sum(0)).to(outs.dtype)


def _softmax(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    q, k, v = (_apart(x, heads) for x in (q, k, v))
    return attend(q, k, v, bias).transpose(1, 2).flatten(2)


def _rotated(x: Tensor, rotary: Rotary) -> Tensor:
    return apply_split_rotary(_apart(x, rotary.cos.shape[1]), rotary.cos, rotary.sin).transpose(1, 2).flatten(2)


def _apart(x: Tensor, heads: int) -> Tensor:
    """[B, T, H * D] to [B, H, T, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
