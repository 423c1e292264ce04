"""Helix context parallelism for grouped-query attention (arXiv 2507.07120), as functions of tensors.

The keys and values of a sequence are dealt to ranks in blocks. Every rank attends all of its query heads to its own
keys; then each sends every other one a share of the heads with their statistics, and merges what it receives. A rank is
left with the finished output of its share of the heads, which is the layout of tensor parallelism: the output projection
and the feed-forward continue from there over the same ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .helix_exchange import Exchange


@dataclass(frozen=True)
class OwnerMap:
    """Which positions' keys and values ``rank`` holds: blocks of ``block`` positions are dealt to ``ranks`` in turn.

    Dealing keeps the shares even while a sequence grows: they never differ by more than a block.
    """

    rank: int = 0
    ranks: int = 1
    block: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks or self.block < 1:
            raise ValueError(f"rank {self.rank} of {self.ranks} with blocks of {self.block} positions is not possible")

    def owner(self, position: int) -> int:
        """The rank that holds a position."""
        return position // self.block % self.ranks

    def count(self, length: int) -> int:
        """How many of the first ``length`` positions this rank holds."""
        rounds, rest = divmod(length, self.block * self.ranks)
        return rounds * self.block + min(max(rest - self.rank * self.block, 0), self.block)

    def positions(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """The positions in ``start..stop - 1`` that this rank holds, rising, int64."""
        held = torch.arange(self.count(start), self.count(stop), device=device)
        return held // self.block * (self.block * self.ranks) + self.rank * self.block + held % self.block


class Partial(NamedTuple):
    """Attention over some of the keys: ``out`` [..., H, D], normalised over them, and ``lse`` [..., H].

    lse: natural logarithm of the sum of the exponentials of the scaled scores, float32 or wider; -inf, with an output of
    0, where no key is visible.
    """

    out: Tensor
    lse: Tensor


def partial_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None) -> Partial:
    """Attention of all queries to this rank's keys, which may be none.

    q: [B, H, T, D]; k, v: [B, Hkv, S, D], every H / Hkv query heads share a key head; visible: bool, broadcastable to
    [B, 1, T, S]. Returns out [B, T, H, D] in q's dtype and lse [B, T, H].
    """
    B, H, T, D = q.shape
    kv_heads, S = k.shape[1], k.shape[2]
    # kernels end the process or return NaN on zero keys
    if S == 0:
        lse = q.new_full((B, T, H), -torch.inf, dtype=_statistics(q.dtype))
        return Partial(q.new_zeros(B, T, H, D), lse)
    # heads that share a key head become rows of one attention: keys are read once and never repeated
    group = H // kv_heads
    rows = q.unflatten(1, (kv_heads, group)).flatten(2, 3)
    if visible is not None:
        visible = visible.expand(B, 1, T, S).repeat(1, 1, group, 1)
    out, lse = _attend(rows, k, v, scale, visible)
    if visible is not None:
        seen = visible.any(-1)
        out, lse = out.where(seen.unsqueeze(-1), 0), lse.where(seen, -torch.inf)
    out, lse = out.reshape(B, H, T, D), lse.reshape(B, H, T)
    return Partial(out.transpose(1, 2), lse.transpose(1, 2))


def merge_over_heads(part: Partial, exchange: Exchange) -> Tensor:
    """Exchange partial attention over heads and combine: this rank's share of the heads, over all keys.

    part: [B, T, H, D] and [B, T, H]; H a multiple of the group's size. Returns [B, T, H / size, D] in the output's dtype.
    """
    if exchange.size == 1:
        return part.out
    received = exchange.all_to_all(pack_heads(part, exchange.size))
    return combine(unpack_heads(received, part.out.dtype))


def pack_heads(part: Partial, ranks: int) -> Tensor:
    """Output and statistics as bytes in one buffer, by destination: one exchange carries both in their own dtypes.

    part: [B, T, H, D] and [B, T, H]. Returns uint8 [ranks, B, T, H / ranks, bytes]. Raises ValueError when the heads
    cannot be shared evenly.
    """
    heads = part.lse.shape[-1]
    if heads % ranks:
        raise ValueError(f"{heads} heads cannot be shared by {ranks} ranks")
    content = torch.cat([_bytes(part.out), _bytes(part.lse.unsqueeze(-1))], dim=-1)
    return content.unflatten(-2, (ranks, heads // ranks)).movedim(-3, 0).contiguous()


def unpack_heads(received: Tensor, dtype: torch.dtype) -> Partial:
    """The inverse of ``pack_heads`` at the destination: [ranks, B, T, H / ranks, D] in ``dtype``, and the statistics."""
    statistics = _statistics(dtype)
    out, lse = received.split([received.shape[-1] - statistics.itemsize, statistics.itemsize], dim=-1)
    return Partial(out.contiguous().view(dtype), lse.contiguous().view(statistics).squeeze(-1))


def combine(parts: Partial) -> Tensor:
    """Attention over all keys from that over each rank's (first dimension), in float32 or wider, in the order of ranks.

    With m the largest lse: sum of exp(lse - m) out, over sum of exp(lse - m). Returns out's dtype, without the first
    dimension; 0 where no rank has a visible key.
    """
    highest = parts.lse.amax(0)
    weight = (parts.lse - highest.where(highest.isfinite(), 0)).exp()
    # where a key is visible the highest weight is 1, so a smaller sum means that none is
    weight = weight / weight.sum(0).clamp_min(1)
    return (parts.out.to(weight.dtype) * weight.unsqueeze(-1)).sum(0).to(parts.out.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """q: [B, H, T, D]; k, v: [B, H, S, D]; visible: [B, 1, T, S]. Rows that see nothing come out undefined."""
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _attend_fused(q, k, v, scale, visible)
    wide = _statistics(q.dtype)
    scores = q.to(wide) @ k.to(wide).mT * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.to(wide)).to(q.dtype), lse


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """The one fused attention of PyTorch that takes a mask and heads of 256, and tells its statistics."""
    B, H, T, _ = q.shape
    bias = None if visible is None else _bias(visible, q.dtype).expand(B, H, T, k.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, *_ = attend(q, k, v, bias, True, scale=scale)
    return out, lse[..., :T]  # the kernel fills up its rows to a multiple of 32


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    keys = visible.shape[-1]
    # the kernel reads rows of the bias in aligned pieces
    room = torch.full((*visible.shape[:-1], -(-keys // 16) * 16), -torch.inf, dtype=dtype, device=visible.device)
    return room[..., :keys].masked_fill_(visible, 0)


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
