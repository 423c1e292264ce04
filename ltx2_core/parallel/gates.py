"""Where all ranks leave a job when the user stops it: at the same gate, so that none waits in an exchange for another.

A rank comes to a gate before every block and before every exchange between groups. Its leader says whether it is open. The
answers lie in memory that the ranks share, so a gate costs nothing as long as the leader is ahead, and the ranks behind it
never ask for more work than the leader has allowed. The ranks that share tokens follow the first of them; the first ranks of
all groups stop only in the evaluation in which rank 0 did.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

from ..host import Interrupted
from .groups import Topology

_NAP_SECONDS = 0.0002
_WORDS = 2
_PASSED, _STOPPED = range(_WORDS)
# gates of one job are numbered from job << 32 on, so that no answer to an earlier job is taken for one to this
_JOB_BITS = 32


class Board:
    """The leaders' answers, in memory shared by ``size`` ranks through a file in a folder of theirs alone."""

    def __init__(self, file: Path, size: int) -> None:
        self.size = size
        num_bytes = 8 * _WORDS * (size + 1)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # as many bytes for whoever comes first, and nothing new for the others
            os.truncate(descriptor, num_bytes)
            self._map = mmap.mmap(descriptor, num_bytes)
        finally:
            os.close(descriptor)
        self.words = memoryview(self._map).cast("q")


class _Line:
    """Gates in a row that one rank, the leader of ``slot``, opens for others."""

    def __init__(self, board: Board, slot: int, leads: bool, job: int) -> None:
        self._words, self._at, self._leads = board.words, _WORDS * slot, leads
        self.next = job << _JOB_BITS

    def stop(self) -> None:
        """Close the next gate, for the leader and all behind it."""
        self._words[self._at + _STOPPED] = self.next

    def is_closed(self) -> bool:
        """Whether the leader has stopped at the gate that comes next here."""
        return self._words[self._at + _STOPPED] == self.next

    def go_through(self, wants_stop: Callable[[], bool]) -> None:
        """Pass the next gate. Raises ``Interrupted`` where the leader stops; ``wants_stop`` is asked of the leader only."""
        if self._leads:
            if wants_stop():
                self.stop()
                raise Interrupted("the parent asked to stop")
            self._words[self._at + _PASSED] = self.next + 1
        while self._words[self._at + _PASSED] <= self.next:
            if self.is_closed():
                raise Interrupted("the leading rank was asked to stop")
            time.sleep(_NAP_SECONDS)
        self.next += 1


class Gates:
    """The gates of one job on one rank."""

    def __init__(
        self,
        board: Board,
        rank: int,
        topology: Topology,
        job: int,
        stop_asked: Callable[[], bool],
        pace: Callable[[], None] = lambda: None,
    ) -> None:
        """stop_asked: whether the parent wants this job to end; rank 0's answer counts.

        pace: called by leaders before they open a gate; waits until the device is not too far behind.
        """
        leader = rank - rank % topology.ulysses
        self._rank, self._stop_asked, self._pace = rank, stop_asked, pace
        self._blocks = _Line(board, leader, rank == leader, job)
        self._exchanges = _Line(board, board.size, rank == 0, job)

    def before_block(self) -> None:
        """Raises ``Interrupted`` on all ranks that share tokens, at the same block."""
        self._blocks.go_through(self._group_stops)

    def before_exchange(self) -> None:
        """Raises ``Interrupted`` on all ranks, before they bring together what their groups have computed."""
        self._exchanges.go_through(self._stop_asked)

    def _group_stops(self) -> bool:
        """Asked of the first rank of a group."""
        self._pace()
        if self._rank == 0 and self._stop_asked():
            # the other groups are heard of again at the exchange that follows
            self._exchanges.stop()
        return self._exchanges.is_closed()
