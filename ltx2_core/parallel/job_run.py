"""One job on all workers of a group: what was heard of each, how long they are waited for, and whether they can go on."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable

from ..host import Interrupted
from .messages import ANSWERS, Message, encode
from .processes import Patience, Processes

_POLL_SECONDS = 0.05

Watch = Callable[[], None]
OnProgress = Callable[[int, Message], None]


class WorkerError(RuntimeError):
    """A worker failed: which (``rank``), where (``stage``), and how (``reason``; ``error`` is an exception's class).

    refused: the job itself was wrong (the exception was a ValueError).
    """

    def __init__(self, rank: int, stage: str, reason: str, error: str = "", *, refused: bool = False) -> None:
        where = f" in stage {stage!r}" if stage else ""
        super().__init__(f"rank {rank} failed{where}: {error + ': ' if error else ''}{reason}")
        self.rank, self.stage, self.reason, self.error, self.refused = rank, stage, reason, error, refused


def no_progress(rank: int, message: Message) -> None:
    pass


class JobRun:
    """One job on all workers: what was heard of each so far."""

    def __init__(
        self, processes: Processes, patience: Patience, request: Message | None, on_progress: OnProgress
    ) -> None:
        """request: None for the start of the workers. Raises MessageError when it may not be sent."""
        self._processes, self._patience, self._on_progress = processes, patience, on_progress
        self._job = 0 if request is None else request.job
        self._segment = None if request is None else request.segment
        self._unsent = None if request is None else encode(request)
        self._silence = patience.start if request is None else patience.silence
        self._stages = ["start" if request is None else ""] * processes.size
        self._answers: dict[int, Message] = {}
        # whether a worker is gone, or in the job where nothing reaches it
        self._is_lost = False

    def send(self) -> None:
        """Give the job to all workers. Raises WorkerError when one does not take it."""
        parts, self._unsent = self._unsent, None
        if parts is None:
            return
        for rank in range(self._processes.size):
            try:
                self._processes.send(rank, parts, self._segment, self._silence)
            except TimeoutError as error:
                raise self._lost(rank, str(error)) from error

    def wait_for_answers(self, watch: Watch) -> None:
        """Until every worker has answered. Raises WorkerError when one cannot any more, or fails and others wait for it."""
        gives_up = time.monotonic() + self._silence
        while not self._all_answered():
            heard = self._take_event()
            watch()
            now = time.monotonic()
            if heard and self._failure() is None:
                gives_up = now + self._silence
            elif heard:
                gives_up = min(gives_up, now + self._patience.others)
            if now > gives_up:
                silent = self._lost(self._first_waiting(), f"gave no sign for {self._silence:g} s")
                # where one has failed, the others wait for it in a collective
                raise self._failure() or silent

    def results(self) -> tuple[Message, ...]:
        """The answers, when all are good ones. Raises WorkerError or Interrupted for what they say else."""
        failure = self._failure()
        if failure is not None:
            raise failure
        answers = tuple(self._answers[rank] for rank in range(self._processes.size))
        if any(answer.kind == "interrupted" for answer in answers):
            raise Interrupted("the workers were stopped")
        return answers

    def stop(self) -> None:
        """Have all workers leave the job, and wait until they have. Workers that are starting cannot."""
        if self._is_lost or not self._job:
            return
        stop = encode(Message("stop", generation=self._processes.generation, job=self._job))
        deadline = time.monotonic() + self._patience.stop
        self._on_progress = no_progress
        with contextlib.suppress(WorkerError, TimeoutError):
            for rank in range(self._processes.size):
                self._processes.send(rank, stop, None, self._patience.stop)
            while not self._all_answered() and time.monotonic() < deadline:
                self._take_event()

    def repeatable(self) -> bool:
        """Whether the workers can take another job: all answered this one, and no rank with an error that others ignore."""
        if self._is_lost or not self._job or not self._all_answered():
            return False
        errors = [answer for answer in self._answers.values() if answer.kind == "error"]
        alike = len(errors) == self._processes.size and len({error.name for error in errors}) == 1
        known = alike or all(error.body.get("agreed") is True for error in errors)
        return known and all(error.body.get("repeatable") is True for error in errors)

    def _all_answered(self) -> bool:
        return len(self._answers) == self._processes.size

    def _first_waiting(self) -> int:
        return next(rank for rank in range(self._processes.size) if rank not in self._answers)

    def _take_event(self) -> bool:
        """Wait a moment for an event; whether there was one."""
        try:
            event = self._processes.events.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            if self._processes.closing():
                raise self._lost(self._first_waiting(), "was ended from outside") from None
            return False
        if event.message is None:
            raise self._failure(event.rank) or self._lost(event.rank, event.reason)
        self._note(event.rank, event.message)
        return True

    def _note(self, rank: int, message: Message) -> None:
        if message.kind == "refused":
            raise self._lost(rank, f"refused a message: {message.body.get('text')}")
        if message.job != self._job:
            return  # of a job that was given up
        self._stages[rank] = message.stage
        if message.kind == "progress":
            self._on_progress(rank, message)
        elif message.kind in ANSWERS:
            self._answers[rank] = message

    def _failure(self, of: int | None = None) -> WorkerError | None:
        """The error that the rank ``of`` answered with, or the first one that any rank did."""
        for rank, answer in self._answers.items():
            if answer.kind == "error" and of in (None, rank):
                text, refused = str(answer.body.get("text")), answer.body.get("refused") is True
                return WorkerError(rank, answer.stage, text, answer.name, refused=refused)
        return None

    def _lost(self, rank: int, reason: str) -> WorkerError:
        self._is_lost = True
        return WorkerError(rank, self._stages[rank], reason)
