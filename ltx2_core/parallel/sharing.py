"""Ranks of one host that read a network together: each gives the parts that it has read to all others.

A thread of its own on every rank hands on one part after the other, in the same order everywhere, while the rank goes on
reading. A collective that one rank does not come to would hold the others, so each part is behind a gate: every rank says
when it has the part, or memory for it, and whoever said so comes to the gate; rank 0's thread opens it when all have, and closes
it for good when any rank has left. Nobody has to be reached for that but memory that the ranks share (`gates.py`), so a
rank may leave at any time, with an error, a stop, or before its reading has begun.

At a gate the devices have nothing left to do for the part, and before the next one it has arrived: at no time do
collectives wait in a device's queues. Other exchanges of the same ranks have to wait until a reading is over.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..host import Interrupted
from .collectives import broadcast
from .gates import Board

_NAP_SECONDS = 0.001
# a part that this rank reads is told of, a rank that leaves is not
_LOOK_SECONDS = 0.02
# on a board: of every rank, up to which part it is ready, and whether it has left; of all, which gates are open, and the end
_READY, _LEFT = _OPEN, _ENDED = range(2)
_WORDS = 2
# parts of one reading are numbered from reading << 32 on
_READING_BITS = 32


@dataclass(frozen=True)
class _Offer:
    """A part in the hands of a rank. ready: the event after which its memory is in no other use."""

    owner: int
    tensors: tuple[Tensor, ...]
    ready: Any


class Sharing:
    """A ``loading.together.Share`` of all ranks of the process group; its thread begins at once.

    board: of its own. reading: a number that grows with every reading, the same on all ranks. While it is open nothing
    else may use the group.
    """

    def __init__(self, board: Board, rank: int, reading: int, device: torch.device):
        self.rank, self.size = rank, board.size
        self._words, self._device = board.words, device
        self._base = reading << _READING_BITS
        self._offers: dict[int, _Offer] = {}
        self._given = 0
        self._done = self._leaves = False
        self._error: BaseException | None = None
        # guards nothing: wakes the thread when a part was offered, and whoever waits when one was given
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="ltx2 sharing", daemon=True)
        self._thread.start()

    def offer(self, number: int, owner: int, tensors: Sequence[Tensor]) -> None:
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        with self._news:
            self._offers[number] = _Offer(owner, tuple(tensors), ready)
            self._news.notify_all()

    def given(self) -> int:
        return self._given

    def wait(self, seconds: float) -> None:
        with self._news:
            given = self._given
            self._news.wait_for(lambda: self._given > given or self.over(), seconds)

    def over(self) -> bool:
        return self._error is not None or self._has_ended() or bool(self._gone())

    def check(self) -> None:
        if self._error is not None:
            raise self._error
        if self.over():
            gone = self._gone()
            raise Interrupted(f"rank {gone[0]} has left the reading" if gone else "the reading was ended on all ranks")

    def close(self) -> None:
        with self._news:
            if not self._done:
                self._leaves = True
                # told here: the thread may be at a gate, which it leaves only when rank 0 has decided
                self._words[_WORDS * self.rank + _LEFT] = self._base
            self._news.notify_all()
        # it waits for rank 0's decision and for collectives that are under way everywhere, never for a rank that reads
        self._thread.join()
        self._offers.clear()

    # in the thread

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            while (offer := self._take(self._given)) is not None and self._pass_gate():
                self._give(offer)
                with self._news:
                    self._given += 1
                    # the last one has none
                    self._done = not offer.tensors
                    self._news.notify_all()
                if self._done:
                    return
        except BaseException as error:
            self._error = error.with_traceback(None)
        self._leave()

    def _take(self, number: int) -> _Offer | None:
        """The next part, when it has been offered; None when this rank leaves, or the reading is over."""
        while True:
            with self._news:
                self._news.wait_for(lambda: number in self._offers or self._leaves, _LOOK_SECONDS)
                if number in self._offers and not self._leaves:
                    break
            if self._leaves or self.over():
                return None
        offer = self._offers.pop(number)
        if offer.ready is not None:
            offer.ready.synchronize()
        return offer

    def _pass_gate(self) -> bool:
        """Whether all ranks give the next part now: the same on all of them."""
        number = self._base + self._given + 1
        self._words[_WORDS * self.rank + _READY] = number
        while True:
            if self._words[_WORDS * self.size + _OPEN] >= number:
                return True
            if self._has_ended():
                return False
            # from here on a rank that has said it is ready stays, until rank 0 has decided
            if self.rank == 0:
                if self._leaves or self._gone():
                    return False
                if all(self._words[_WORDS * rank + _READY] >= number for rank in range(self.size)):
                    self._words[_WORDS * self.size + _OPEN] = number
                    continue
            time.sleep(_NAP_SECONDS)

    def _give(self, offer: _Offer) -> None:
        stream = _stream(self._device) if self._device.type == "cuda" else None
        with torch.cuda.stream(stream):
            for tensor in offer.tensors:
                # bytes: not every transport knows every type
                broadcast(tensor.view(-1).view(torch.uint8), offer.owner)
        if stream is not None:
            stream.synchronize()

    def _leave(self) -> None:
        self._words[_WORDS * self.rank + _LEFT] = self._base
        if self.rank == 0:
            self._words[_WORDS * self.size + _ENDED] = self._base
        with self._news:
            self._news.notify_all()

    def _has_ended(self) -> bool:
        return self._words[_WORDS * self.size + _ENDED] == self._base

    def _gone(self) -> list[int]:
        return [rank for rank in range(self.size) if self._words[_WORDS * rank + _LEFT] == self._base]


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One a device for good. What the rank computes meanwhile is asked for on others, and not waited for."""
    return torch.cuda.Stream(device)
