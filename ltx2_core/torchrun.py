"""Ranks that torchrun has started, on several machines or one, and that make a clip together.

Every rank runs the whole workflow; only sampling is shared. Ranks that share the tokens of a pass are of one machine, and
between machines go the predictions of guidance passes. What one rank alone can fail at before it samples is agreed on; a rank
that ends anywhere else is noticed by torchrun, which ends the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch

from .fleet.agreement import Agreement
from .host import host
from .parallel.collectives import Control, connect, join_by_environment
from .parallel.context import ParallelContext
from .parallel.exchange_choice import fastest_exchange
from .parallel.groups import PassGroups, Topology
from .parallel.topology import StageWork, name, step_seconds
from .ranks import ALONE, Ranks, Seat
from .sampling.guidance import GuidancePass
from .settled import settled

_LOG = logging.getLogger("ltx2.engine")

T = TypeVar("T")

# one machine may read its files for so much longer than another
_TIMEOUT = timedelta(minutes=30)


class TorchrunRanks(Ranks):
    """All ranks, as one of them sees them."""

    def __init__(self, rank: int, size: int, ranks_per_machine: int) -> None:
        """Returns when all ranks are there. Raises ValueError for machines with different numbers of ranks."""
        if size % ranks_per_machine:
            raise ValueError(
                f"{size} ranks, {ranks_per_machine} of them here: start as many on every machine (--nproc-per-node)"
            )
        self.rank, self.size, self._per_machine = rank, size, ranks_per_machine
        self.takes_passes_apart = size > ranks_per_machine
        on_gpu = torch.cuda.is_available()
        self._device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        join_by_environment("nccl" if on_gpu else "gloo", _TIMEOUT, self._device if on_gpu else None)
        self._agreement = Agreement(Control(_TIMEOUT).exchange)
        self._connected: dict[Topology, tuple[ParallelContext, PassGroups]] = {}

    @property
    def that_decode(self) -> Ranks:
        """Every rank decodes for itself: frames do not cross the network."""
        return ALONE

    def agree(self, work: Callable[[], T]) -> T:
        return self._agreement.on(work)

    def least(self, number: int | None) -> int | None:
        return self._agreement.least(number)

    def topology(self, work: StageWork, passes: Sequence[GuidancePass], wanted: str, *, batched: bool) -> Topology:
        """The cheapest division with token groups inside a machine. Raises ValueError where there is none.

        With fewer passes than machines some have nothing to compute: tokens do not cross the network.
        """
        if batched and self.takes_passes_apart:
            raise ValueError(
                "evaluation batched keeps all passes together; machines share split ones: choose split or auto"
            )
        costs = step_seconds(work, passes, self.size)
        if batched:
            costs = {one: cost for one, cost in costs.items() if one.groups == 1}
        inside = {one: cost for one, cost in costs.items() if self._per_machine % one.ulysses == 0}
        if not inside:
            raise ValueError(f"{self.size} ranks cannot share {work.config.streams.video.heads} attention heads")
        chosen = min(inside, key=lambda one: inside[one])
        _LOG.info("topology %s (groups x ranks of a group) of %d passes", name(chosen), len(passes))
        return chosen

    @contextmanager
    def sampling(self, topology: Topology) -> Iterator[Seat]:
        if topology not in self._connected:
            parallel, groups = connect(self.rank, topology)
            self._connected[topology] = fastest_exchange(parallel, self._device), groups
        yield Seat(host().check_interrupt, *self._connected[topology], settled)
