"""What an engine asks of the other ranks that make the same clip; here there are none. `fleet/team.py` has others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from .host import host
from .loading.together import Share
from .parallel.bands import WHOLE, Bands
from .parallel.context import SINGLE, ParallelContext
from .parallel.groups import ONE_GROUP, PassGroups, Topology
from .parallel.topology import StageWork
from .sampling.denoise import Evaluate
from .sampling.guidance import GuidancePass

T = TypeVar("T")


def _as_it_is(evaluate: Evaluate) -> Evaluate:
    return evaluate


@dataclass(frozen=True)
class Seat:
    """Where a rank sits during one stage.

    check: called before every block, raises to stop. settled: makes an evaluation one whose predictions all ranks agree on.
    """

    check: Callable[[], None]
    parallel: ParallelContext = SINGLE
    groups: PassGroups = ONE_GROUP
    settled: Callable[[Evaluate], Evaluate] = _as_it_is


class Ranks:
    """One process by itself: it agrees with itself about everything, and stops when its host says so."""

    rank = 0
    size = 1
    # whether passes are evaluated one by one where nobody chose, because groups share them
    takes_passes_apart = False

    @property
    def that_decode(self) -> Ranks:
        """Those that decode a clip together."""
        return self

    def agree(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, if it succeeds on all ranks. Raises on all ranks if it fails on one."""
        return work()

    def least(self, number: int | None) -> int | None:
        """The smallest that any rank gives; one that gives None has as much as anybody asks for."""
        return number

    def share(self, plan: Callable[[], int | None], label: str) -> Share | None:
        """A reading of a network that all ranks share, where all of them have the same plan for it, each with files of its
        own host; None where each reads for itself. All ranks ask at the same time. plan: gives None where there is nothing
        to share.
        """
        return None

    def topology(self, work: StageWork, passes: Sequence[GuidancePass], wanted: str, *, batched: bool) -> Topology:
        """How the ranks share the passes of a stage. batched: all passes are one evaluation."""
        return Topology(1, 1)

    @contextmanager
    def sampling(self, topology: Topology) -> Iterator[Seat]:
        """A stage, in which ranks wait for each other: all of them enter it, and leave it at the same place."""
        yield Seat(host().check_interrupt)

    @contextmanager
    def decoding(self, rows: int) -> Iterator[tuple[Bands, Callable[[], None]]]:
        """Decoding a picture of so many latent rows: this rank's band, and what is called before every layer."""
        yield WHOLE, host().check_interrupt


ALONE = Ranks()
_current: ContextVar[Ranks] = ContextVar("ltx2_ranks", default=ALONE)


def ranks_of_process() -> Ranks:
    """The ranks that this process belongs to, with all of its engines."""
    return _current.get()


@contextmanager
def use_ranks(ranks: Ranks) -> Iterator[None]:
    """Engines that are opened inside the block sample with ``ranks``."""
    token = _current.set(ranks)
    try:
        yield
    finally:
        _current.reset(token)
