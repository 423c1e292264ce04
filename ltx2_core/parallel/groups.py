"""Guidance passes over groups of ranks: every group evaluates some of them, and every rank gets all predictions.

Guidance itself is computed on every rank from the same predictions, so all ranks sample the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..av import AV
from .context import Collectives

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """``groups`` groups of ``ulysses`` ranks each: ranks with consecutive numbers share the tokens of a pass."""

    groups: int
    ulysses: int

    @property
    def within(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that share tokens, group by group."""
        return tuple(tuple(range(g * self.ulysses, (g + 1) * self.ulysses)) for g in range(self.groups))

    @property
    def across(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that have the same place in their groups: they bring predictions together."""
        return tuple(zip(*self.within, strict=True))


@dataclass(frozen=True)
class PassGroups:
    """Where this rank stands among the groups that share passes. One group evaluates all of them.

    own: number of this rank's group. collectives: of the ranks that have this one's place, in the order of groups.
    """

    own: int = 0
    count: int = 1
    collectives: Collectives | None = None

    def __post_init__(self):
        if not 0 <= self.own < self.count:
            raise ValueError(f"group {self.own} is not among {self.count} groups")
        if (self.count > 1) != (self.collectives is not None):
            raise ValueError(f"{self.count} groups: several need collectives, one by itself has none")

    def of(self, passes: Sequence[T]) -> Sequence[T]:
        """The passes of this group, which may be none. Conditional and perturbed pass meet, to share what they can."""
        return passes[self.own :: self.count]

    def gather(self, own: Sequence[AV[Tensor]], num_passes: int, like: AV[Tensor]) -> list[AV[Tensor]]:
        """Predictions of all passes from those of this group's. One exchange a stream, for every rank of all groups.

        like: tensors of the shapes and the dtype of a prediction.
        """
        exchange = self.collectives
        if exchange is None:
            return list(own)
        rounds = -(-num_passes // self.count)

        def all_passes(like: Tensor, *ours: Tensor) -> list[Tensor]:
            missing = [torch.zeros_like(like)] * (rounds - len(ours))
            gathered = exchange.all_gather(torch.stack((*ours, *missing)))  # [groups, rounds, B, T, C]
            return [gathered[index % self.count, index // self.count] for index in range(num_passes)]

        together = like.map(all_passes, *own)
        return [together.map(lambda parts, index=index: parts[index]) for index in range(num_passes)]


ONE_GROUP = PassGroups()
