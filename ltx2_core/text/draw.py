"""The choice of the next token, by a generator of its own: no other random numbers are used up or waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Randomness:
    """How a token is drawn. temperature: 0 takes the likeliest one; 1 follows the model, lower values are bolder.

    top_k: how many of the likeliest tokens may be drawn. top_p: the share of probability that they must reach together.
    """

    temperature: float = 0.7
    top_k: int = 64
    top_p: float = 0.95


class Draw:
    """A step of ``generate``'s scores: leaves one token, so that taking the likeliest one takes what was drawn.

    never: ids that are not drawn. size: how many ids the tokenizer can read; embeddings have rows beyond them. Numbers
    come from the CPU, so a seed draws alike on every device.
    """

    def __init__(self, randomness: Randomness, seed: int, *, size: int, never: Sequence[int] = ()) -> None:
        self._random, self._size, self._never = randomness, size, list(never)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [B, V]. Returns [B, V], -inf but for one of each row."""
        allowed = scores.float()
        allowed[:, self._size :] = -torch.inf
        allowed[:, self._never] = -torch.inf
        best, ids = allowed.topk(min(self._random.top_k, allowed.shape[-1]))
        chosen = ids.gather(-1, self._drawn(best))
        return torch.full_like(allowed, -torch.inf).scatter(-1, chosen, 0.0)

    def _drawn(self, best: Tensor) -> Tensor:
        """best: scores [B, K], falling. Returns which one of each row, [B, 1]."""
        if self._random.temperature == 0:
            return torch.zeros_like(best[:, :1], dtype=torch.long)
        odds = (best / self._random.temperature).softmax(-1)
        # the likeliest ones up to the share, among them the one that reaches it
        odds = odds.where(odds.cumsum(-1) - odds < self._random.top_p, 0)
        waits = torch.empty(odds.shape).exponential_(generator=self._generator)
        # of waits with these rates the shortest belongs to each with its probability
        return (odds / waits.to(odds.device)).argmax(-1, keepdim=True)
