"""Modulation vectors of tokens, stored once for each distinct timestep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """One vector for each token.

    values: [B or 1, U, C], any strides with unit last stride. index: [B, T] int64 or int32, which of the U vectors each
    token has. Without an index U is 1 (all tokens share the vector) or T (each token has its own).
    """

    values: Tensor
    index: Tensor | None = None

    def spread(self, tokens: int) -> Tensor:
        """The vectors in a shape that broadcasts against [B, tokens, C]. Raises ValueError if they are not that many."""
        if self.index is None:
            if self.values.shape[1] not in (1, tokens):
                raise ValueError(f"{self.values.shape[1]} modulation vectors for {tokens} tokens need an index")
            return self.values
        index = self.index.long()[..., None].expand(-1, -1, self.values.shape[-1])
        return self.values.expand(index.shape[0], -1, -1).gather(1, index)

    def to(self, dtype: torch.dtype) -> Rows:
        """The same vectors in another dtype."""
        return Rows(self.values.to(dtype), self.index)

    def first(self, tokens: int) -> Rows:
        """Those of the first ``tokens`` tokens."""
        if self.index is not None:
            return Rows(self.values, self.index[:, :tokens])
        return Rows(self.values[:, :tokens])
