"""Rows of tokens dealt to ranks, so that what acts on each token alone is computed once and not by every rank.

Ranks that share the keys of a sequence all need its tokens for attention, and none of them needs another's tokens for
norms and feed-forward. The output projection's sum over ranks leaves each with its rows, the residual is sliced once, and
only what enters the next attention is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .helix_exchange import Exchange


@dataclass(frozen=True)
class Rows:
    """``count`` rows over the ranks of a group: each has ``chunk`` in a run, the last ones filled up with zeros."""

    count: int
    exchange: Exchange

    @property
    def chunk(self) -> int:
        """Rows of every rank: count / size, rounded up."""
        return -(-self.count // self.exchange.size)

    def slice(self, hidden: Tensor) -> Tensor:
        """[count, ...] to this rank's [chunk, ...]."""
        own = hidden[self.exchange.rank * self.chunk :][: self.chunk]
        return _filled(own, self.chunk)

    def slice_with(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same of a pair whose residual may not have begun yet: no residual gives none.

        Who carries no residual beside its hidden state calls ``slice``.
        """
        return self.slice(hidden), None if residual is None else self.slice(residual)

    def gather(self, own: Tensor) -> Tensor:
        """Every rank's [chunk, ...] to [count, ...]."""
        return self.exchange.all_gather(own).flatten(0, 1)[: self.count]

    def reduce(self, partial: Tensor) -> Tensor:
        """This rank's [chunk, ...] of the sum over ranks of [count, ...]: half the traffic of summing all and slicing."""
        size = self.exchange.size
        return self.exchange.reduce_scatter(_filled(partial, self.chunk * size).unflatten(0, (size, self.chunk)))


def _filled(x: Tensor, rows: int) -> Tensor:
    missing = rows - x.shape[0]
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x
