"""How ranks learn what went well on all of them: after each part that one of them can fail at alone, all exchange a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..host import Interrupted
from ..parallel.worker_process import REPEATABLE

T = TypeVar("T")

# of an error's text in a word; the rank itself tells the parent all of it
_MAX_TEXT = 300


class Agreement:
    """What one rank says and hears. exchange: from its word to those of all ranks, in the order of ranks.

    All ranks agree about the same things in the same order. An error that all of them have heard of is not told again.
    """

    def __init__(self, exchange: Callable[[bytes], list[bytes]]) -> None:
        self._exchange = exchange
        self._told: BaseException | None = None
        # what has ended the job on all ranks, after which they can go on
        self.agreed: BaseException | None = None

    def on(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, if it succeeds on all ranks.

        Else it raises on all of them: its own error where it failed or was stopped, ``Interrupted`` on the others.
        """
        try:
            result = work()
        except BaseException as error:
            if error is not self._told:
                self._tell(_Word.of(error), error)
            raise
        self._tell(_Word())
        return result

    def least(self, number: int | None) -> int | None:
        """The smallest number that any rank gives; None counts for nothing."""
        return min((other for other in self.numbers(number) if other is not None), default=None)

    def numbers(self, number: int | None) -> list[int | None]:
        """What each rank gives, in their order."""
        return [word.number for word in self._tell(_Word(number=number))]

    def stopped(self, stop: BaseException) -> None:
        """All ranks have left the job with this, without a word."""
        self._told = self.agreed = stop

    def forget(self) -> None:
        """Let go of what ended the last job."""
        self._told = self.agreed = None

    def _tell(self, mine: _Word, error: BaseException | None = None) -> list[_Word]:
        words = [_Word.read(word) for word in self._exchange(mine.to_bytes())]
        bad = {rank: word for rank, word in enumerate(words) if word.kind != "fine"}
        if not bad:
            return words
        if error is None:
            listed = "; ".join(f"rank {rank}: {word.text}" for rank, word in bad.items())
            error = Interrupted(f"given up by all ranks: {listed}")
        self._told = error
        # nothing has begun, so after an error that may be repeated all ranks are as they were
        if all(word.kind != "broken" for word in bad.values()):
            self.agreed = error
        raise error


@dataclass(frozen=True)
class _Word:
    """How something went on one rank: fine, stopped, failed in a way that may be repeated, or broken."""

    kind: str = "fine"
    text: str = ""
    number: int | None = None

    @classmethod
    def of(cls, error: BaseException) -> _Word:
        if isinstance(error, Interrupted):
            return cls("stopped", "stopped")
        kind = "failed" if isinstance(error, REPEATABLE) else "broken"
        return cls(kind, f"{type(error).__name__}: {error}"[:_MAX_TEXT])

    def to_bytes(self) -> bytes:
        return json.dumps([self.kind, self.text, self.number]).encode()

    @classmethod
    def read(cls, data: bytes) -> _Word:
        return cls(*json.loads(data.decode()))
