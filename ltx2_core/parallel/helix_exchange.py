"""What the ranks of one group tell each other, whatever carries it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Exchange(Protocol):
    """The exchanges of one group of ``size`` ranks. All of its ranks call the same ones in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_to_all(self, parts: Tensor) -> Tensor:
        """[size, ...] to [size, ...]: part i goes to rank i, part i of the result comes from rank i."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[...] to [size, ...]: every rank's tensor, in the order of ranks."""
        ...

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """[size, ...] to [...]: the sum over ranks of the part with this rank's number."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """[...] to [...]: the sum over ranks, the same bits on all of them."""
        ...


class Alone:
    """A group of one rank: nothing is sent."""

    rank = 0
    size = 1

    def all_to_all(self, parts: Tensor) -> Tensor:
        return parts

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        return parts[0]

    def all_reduce(self, x: Tensor) -> Tensor:
        return x
