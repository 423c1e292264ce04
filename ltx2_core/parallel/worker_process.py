"""The life of a worker process: it takes jobs, tells how far they are, answers each, and leaves when its parent does."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

from torch import Tensor

from ..host import HostOutOfMemory, Interrupted
from .channel import Channel, ChannelClosed
from .messages import MAX_LABEL, Message, MessageError
from .placement import Placed

log = logging.getLogger("ltx2.parallel")

_MAX_TEXT = 4000
# what a handler raises before it has begun, on all ranks alike; after anything else the state of the ranks is unknown
REPEATABLE = (ValueError, HostOutOfMemory)


@dataclass(frozen=True)
class Seat:
    """Which worker this is. folder: of its own, empty at first, 0700; removed by the parent.

    group_folder: shared by the ranks of this generation alone.
    """

    rank: int
    size: int
    generation: int
    folder: Path

    @property
    def group_folder(self) -> Path:
        return self.folder.parent


@dataclass(frozen=True)
class Result:
    """What a handler returns for a job: JSON values, tensors on the CPU, and which tensors lie in the job's segment."""

    body: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    placed: Mapping[str, Placed] = field(default_factory=dict)


class Handler(Protocol):
    """What a worker computes. Made once a process, in its main thread, where ``run`` and ``close`` are called too."""

    def run(self, job: Job) -> Result:
        """Do a job. Raises ``Interrupted`` when ``job.check_interrupt`` does.

        A ValueError or HostOutOfMemory leaves the group as it is if all ranks raise it, or if those that do set ``job.agreed``
        and the others raise ``Interrupted``; any other error ends it.
        """

    def close(self) -> None:
        """Leave the process group, give up devices: the process ends."""


class Job:
    """A job in a handler's hands: what is asked for (``request``), and the way to its parent while it runs."""

    def __init__(self, request: Message, inbox: Inbox, stage: str = "") -> None:
        self.request = request
        self.stage = stage
        # whether all ranks know of the error that ends the job, and have left it like this one
        self.agreed = False
        self._inbox = inbox

    def enter_stage(self, stage: str) -> None:
        """Say what begins now; errors name it."""
        self.stage = stage
        self.tell("stage")

    def progress(self, body: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Send an event to the parent: JSON values and small tensors (a preview)."""
        self.tell("progress", body=body, tensors=tensors or {})

    def interrupted(self) -> bool:
        """Whether the parent asked to stop. Ranks that wait for each other ask one of them."""
        return self._inbox.stopped_job >= self.request.job

    def check_interrupt(self) -> None:
        """Raise ``Interrupted`` if the parent asked to stop."""
        if self.interrupted():
            raise Interrupted("the parent asked to stop")

    def tell(self, kind: str, **fields: Any) -> None:
        """Send a message about this job; fields: further ones of ``Message``."""
        self._inbox.channel.send(Message(kind, self.request.generation, self.request.job, self.stage, **fields))


class Inbox:
    """Receives in a thread of its own, so that a stop is seen while a job runs, and the parent's end at any time."""

    def __init__(self, channel: Channel, generation: int) -> None:
        self.channel = channel
        # the last job that shall stop, whether it has begun or not
        self.stopped_job = 0
        self._generation = generation
        self._jobs: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="ltx2 inbox", daemon=True).start()

    def next_job(self) -> Message | None:
        """Wait for the next job; None when the parent wants this process to end."""
        return self._jobs.get()

    def _listen(self) -> None:
        try:
            while True:
                try:
                    self._note(self.channel.receive())
                except MessageError as error:
                    log.warning("a message was refused: %s", error)
                    self.channel.send(Message("refused", generation=self._generation, body=_text(error)))
        except ChannelClosed:
            # the main thread may be anywhere, and nobody is left to wait for it
            os._exit(0)

    def _note(self, message: Message) -> None:
        if message.generation != self._generation:
            raise MessageError(f"{message.kind} is for generation {message.generation}, this is {self._generation}")
        if message.kind == "job":
            self._jobs.put(message)
        elif message.kind == "stop":
            self.stopped_job = max(self.stopped_job, message.job)
        elif message.kind == "close":
            self._jobs.put(None)
        else:
            raise MessageError(f"{message.kind} is nothing to send to a worker")


def serve(make_handler: Callable[[Seat], Handler], arguments: Sequence[str] | None = None) -> NoReturn:
    """Be a worker until the parent says ``close`` or is gone. arguments: as ``processes.py`` writes them."""
    descriptor, rank, size, generation, _, folder = arguments or sys.argv[1:]
    seat = Seat(int(rank), int(size), int(generation), Path(folder))
    inbox = Inbox(Channel.inherited(int(descriptor)), seat.generation)
    handler = _open(make_handler, seat, inbox)
    while _answer_next(handler, inbox):
        pass
    handler.close()
    _leave(0)


def _open(make_handler: Callable[[Seat], Handler], seat: Seat, inbox: Inbox) -> Handler:
    """The handler, after the parent was told that it is there; a process without one ends."""
    begin = Job(Message("job", generation=seat.generation), inbox, "start")
    try:
        handler = make_handler(seat)
    except BaseException as error:
        _tell_error(begin, error)
        _leave(1)
    begin.tell("ready")
    return handler


def _answer_next(handler: Handler, inbox: Inbox) -> bool:
    """Run one job and send its answer, whatever happens; nothing of it is held afterwards. False when none follows."""
    request = inbox.next_job()
    if request is None:
        return False
    job = Job(request, inbox)
    try:
        # a stop that has come already is for the handler too: other ranks may have begun
        result = handler.run(job)
        job.tell("result", body=result.body, tensors=result.tensors, placed=result.placed)
    except ChannelClosed:
        _leave(0)
    except Interrupted:
        job.tell("interrupted")
    except BaseException as error:
        _tell_error(job, error)
    finally:
        if request.segment is not None:
            request.segment.close()
    return True


def _tell_error(job: Job, error: BaseException) -> None:
    refused = isinstance(error, ValueError)
    # the parent says what is wrong with a job
    log.log(logging.DEBUG if refused else logging.ERROR, "stage %r failed", job.stage, exc_info=error)
    body = {**_text(error), "repeatable": isinstance(error, REPEATABLE), "refused": refused, "agreed": job.agreed}
    job.tell("error", name=ascii(type(error).__name__)[1:-1][:MAX_LABEL], body=body)


def _text(error: BaseException) -> dict[str, str]:
    return {"text": str(error)[:_MAX_TEXT]}


def _leave(code: int) -> NoReturn:
    """End at once: threads of libraries and exit handlers have nothing to save, and could wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
