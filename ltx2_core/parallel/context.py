"""What the model sees of other ranks: where its tokens lie, and a few functions of tensors that exchange them.

A sequence of N tokens is split over P ranks in contiguous shares of ceil(N / P); behind the last token the shares are
filled up with zeros, which no exchange hands on. With one rank every function returns what it is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# How audio reads video keys that are split over ranks; see transformer/heads.py.
V2A_MODES = ("partial", "heads", "heads_late")


class Collectives(Protocol):
    """What ranks exchange. All ranks of a group call the same functions in the same order, with the same shapes."""

    def all_to_all(self, x: Tensor) -> Tensor:
        """x: [P, ...] contiguous, a piece for every rank. Returns [P, ...], the piece of every rank for this one."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """x: [...] contiguous. Returns [P, ...], that of every rank."""
        ...


class Copies(Protocol):
    """An exchange beside the computing: what is begun is there behind the next meeting. All ranks use it alike."""

    def carries(self, x: Tensor, split: Split) -> bool:
        """Whether tokens [B, share, W] can go this way; if not, collectives exchange them."""
        ...

    def heads(self, place: str, x: Tensor, split: Split) -> Tensor:
        """Begin to give every rank its heads of tokens [1, share, W]. Returns where [1, N, W / P] will be."""
        ...

    def tokens(self, x: Tensor, split: Split) -> Tensor:
        """Give every rank its tokens of heads [1, N, W / P]. Returns [1, share, W]; ranks have met then."""
        ...

    def meet(self) -> None:
        """Wait, on the device, for what all ranks have begun."""
        ...


@dataclass(frozen=True)
class ParallelContext:
    """Where this process stands among the ranks that share a sequence. v2a: one of ``V2A_MODES``. copies: of the attention
    among tokens, where there is something faster than collectives.
    """

    rank: int = 0
    size: int = 1
    collectives: Collectives | None = None
    v2a: str = "partial"
    copies: Copies | None = None

    def __post_init__(self):
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not among {self.size} ranks")
        if self.size > 1 and self.collectives is None:
            raise ValueError(f"{self.size} ranks need collectives to exchange tokens")
        if self.v2a not in V2A_MODES:
            raise ValueError(f"v2a {self.v2a!r} is not known; choose {', '.join(V2A_MODES)}")

    @property
    def exchange(self) -> Collectives:
        assert self.collectives is not None, "one rank exchanges nothing"
        return self.collectives

    def agree(self, fine: bool, device: torch.device) -> bool:
        """Whether something went well on all ranks, each of which says how it went here; waits for the device."""
        if self.size == 1:
            return fine
        return bool(self.exchange.all_gather(torch.tensor([fine], dtype=torch.uint8, device=device)).all())


SINGLE = ParallelContext()


@dataclass(frozen=True)
class Ahead:
    """Tokens that are on their way to the ranks of their heads: where they will be."""

    arriving: Tensor


@dataclass(frozen=True)
class Split:
    """How the tokens of one stream lie on the ranks. tokens: N of the whole sequence, where it is split."""

    context: ParallelContext = SINGLE
    tokens: int = 0

    @property
    def size(self) -> int:
        return self.context.size

    @property
    def share(self) -> int:
        """Tokens that every rank holds, fillers included."""
        return -(-self.tokens // self.size)

    @property
    def valid(self) -> int:
        """Tokens of the sequence that this rank holds; the last ranks may have none."""
        return self.valid_of(self.context.rank)

    def valid_of(self, rank: int) -> int:
        return min(max(self.tokens - rank * self.share, 0), self.share)

    def take(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of a tensor with all N tokens on axis ``dim``, filled up with zeros, contiguous."""
        if self.size == 1:
            return x
        start = min(self.context.rank * self.share, self.tokens)
        return _filled(x.narrow(dim, start, self.valid), dim, self.share).contiguous()

    def ahead(self, place: str, x: Tensor) -> Tensor | Ahead:
        """Begin the exchange of one of the tensors of ``to_heads``, [B, share, W], where that works beside computing.

        place: "queries", "keys" or "values". What is begun stays as it is until ``to_heads``.
        """
        copies = self.context.copies
        return Ahead(copies.heads(place, x, self)) if copies is not None and copies.carries(x, self) else x

    def to_heads(self, *tensors: Tensor | Ahead) -> tuple[Tensor, ...]:
        """Tensors [B, share, W] of alike shape to [B, N, W / P]: all tokens, the heads of this rank. One exchange."""
        begun = [x.arriving for x in tensors if isinstance(x, Ahead)]
        if begun:
            assert len(begun) == len(tensors), "tensors of one shape go one way"
            assert self.context.copies is not None
            self.context.copies.meet()
            return tuple(begun)
        return self._to_heads(*(x for x in tensors if isinstance(x, Tensor)))

    def _to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.size == 1:
            return tensors
        first = tensors[0]
        # for every rank, token by token, its heads of all tensors: behind the exchange tokens are rows, without a copy
        packed = first.new_empty(self.size, *first.shape[:2], len(tensors), first.shape[2] // self.size)
        for index, x in enumerate(tensors):
            packed[:, :, :, index] = x.unflatten(2, (self.size, -1)).movedim(2, 0)
        return self._joined(self.context.exchange.all_to_all(packed)).unbind(2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back: [B, N, W / P] to [B, share, W]. One exchange."""
        if self.size == 1:
            return x
        copies = self.context.copies
        if copies is not None and copies.carries(x, self):
            return copies.tokens(x, self)
        shares = _filled(x, 1, self.share * self.size).unflatten(1, (self.size, -1))
        return _side_by_side(self.context.exchange.all_to_all(shares.movedim(1, 0).contiguous()))

    def gather(self, x: Tensor) -> Tensor:
        """[B, share, C] of every rank to all tokens [B, N, C]. One exchange."""
        if self.size == 1:
            return x
        return self._joined(self.context.exchange.all_gather(x.contiguous())).contiguous()

    def own_heads(self, x: Tensor, dim: int) -> Tensor:
        """Of all heads on axis ``dim``, or of their values, those of this rank. No exchange."""
        return x if self.size == 1 else x.chunk(self.size, dim)[self.context.rank]

    def gather_heads(self, x: Tensor) -> Tensor:
        """[B, T, W / P], the heads of every rank for tokens that all ranks have, to [B, T, W]. One exchange."""
        return x if self.size == 1 else _side_by_side(self.context.exchange.all_gather(x.contiguous()))

    def gather_parts(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors of any shapes and dtypes to [P, ...], those of every rank. One exchange of their bytes."""
        mine = torch.cat([x.reshape(-1).view(torch.uint8) for x in (out, lse)])
        outs, sums = self.context.exchange.all_gather(mine).split([out.nbytes, lse.nbytes], dim=1)
        return _as(outs, out), _as(sums, lse)

    def _joined(self, shares: Tensor) -> Tensor:
        """[P, B, share, ...] to [B, N, ...]; a view for one sample."""
        return shares.movedim(0, 1).flatten(1, 2)[:, : self.tokens]


WHOLE = Split()


def _filled(x: Tensor, dim: int, count: int) -> Tensor:
    """Zeros behind axis ``dim`` up to ``count``."""
    missing = count - x.shape[dim]
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x


def _as(raw: Tensor, like: Tensor) -> Tensor:
    """Bytes [P, n] as tensors [P, ...] of that shape and dtype."""
    # bytes that begin anywhere cannot be read as numbers
    return raw.flatten().view(like.dtype).view(-1, *like.shape)


def _side_by_side(heads: Tensor) -> Tensor:
    """[P, B, T, W / P] to [B, T, W]"""
    return heads.movedim(0, 2).flatten(2)
