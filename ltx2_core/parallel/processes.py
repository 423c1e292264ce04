"""The worker processes of one generation, from their start to their end; what they are asked to do is not known here."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .channel import Channel, ChannelClosed
from .messages import Message, MessageError
from .shared_memory import Segment
from .worker_environment import worker_environment

log = logging.getLogger("ltx2.parallel")

_POLL_SECONDS = 0.05
# what the names of all threads of the pack begin with
_OURS = "ltx2 "
# libraries make Unix sockets in a worker's folder, whose whole path may have 107 bytes
_MAX_TEMPORARY_PATH = 60


@dataclass(frozen=True)
class Patience:
    """Seconds that a group of workers is waited for.

    start: until all are ready. silence: between two messages of a group that has a job. others: for the other ranks to
    answer when one has failed. stop: to leave a job. end: to leave after ``close``, and after SIGTERM.
    """

    start: float = 300.0
    silence: float = 120.0
    others: float = 5.0
    stop: float = 10.0
    end: float = 5.0


@dataclass(frozen=True)
class Launch:
    """How workers are started. entry: the file that a worker runs. environment: variables beside those of every worker."""

    size: int
    entry: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    patience: Patience = Patience()


@dataclass(frozen=True)
class Event:
    """A message of a worker, or, where there is none, what happened to it."""

    rank: int
    message: Message | None
    reason: str = ""


@dataclass(frozen=True)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    channel: Channel
    listener: threading.Thread


class Processes:
    """Workers that live until ``close``. Those that end before it are reported as an event.

    One thread starts them, watches for their end, and ends them: the death signal that workers ask for comes when the
    *thread* that started them ends. One more thread for each worker receives its messages.
    """

    def __init__(self, launch: Launch, generation: int) -> None:
        """Returns before any worker is ready. Raises OSError where there are no Unix sockets."""
        if not hasattr(socket, "AF_UNIX") or os.name != "posix":
            raise OSError(f"several devices need Unix sockets, which {sys.platform} does not have")
        self.generation = generation
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._launch = launch
        self._workers: list[_Worker] = []
        self._started, self._closing, self._failed = threading.Event(), threading.Event(), threading.Event()
        self._polite = True
        self._thread = threading.Thread(target=self._live, name=_OURS + "workers", daemon=True)
        self._thread.start()
        self._started.wait()

    @property
    def size(self) -> int:
        return self._launch.size

    def usable(self) -> bool:
        """Whether all of them live and shall go on living."""
        return not (self._failed.is_set() or self._closing.is_set())

    def closing(self) -> bool:
        """Whether somebody has called ``close``: no event says so."""
        return self._closing.is_set()

    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def send(self, rank: int, parts: tuple[bytes, bytes], segment: Segment | None, seconds: float) -> None:
        """Send an encoded message to one worker. One that is gone gets none: there is an event of that.

        Raises TimeoutError when it does not take the message within ``seconds``.
        """
        with contextlib.suppress(ChannelClosed):
            self._workers[rank].channel.send_encoded(parts, segment, seconds)

    def close(self, polite: bool = True) -> None:
        """End all workers and wait until processes, threads and files are gone.

        They are asked to leave, or else (``polite`` is False, or they do not) terminated, and killed if that does not help.
        """
        self._polite = self._polite and polite
        self._closing.set()
        # the collector may call this in any thread, and the pack's own could be waited for here
        if not threading.current_thread().name.startswith(_OURS):
            self._thread.join()

    # the thread of the group

    def _live(self) -> None:
        try:
            with tempfile.TemporaryDirectory(
                prefix="ltx2-", dir=_temporary_folder(), ignore_cleanup_errors=True
            ) as folder:
                try:
                    self._start(Path(folder))
                    self._watch()
                finally:
                    self._end()
        except OSError as error:
            self._report(min(len(self._workers), self.size - 1), f"could not be started: {error}")
        finally:
            self._started.set()

    def _start(self, folder: Path) -> None:
        for rank in range(self.size):
            self._workers.append(self._start_one(rank, folder / f"rank{rank}"))
        self._started.set()

    def _start_one(self, rank: int, folder: Path) -> _Worker:
        folder.mkdir(mode=0o700)
        launch = self._launch
        ours, theirs = socket.socketpair()
        with theirs:
            numbers = (theirs.fileno(), rank, launch.size, self.generation, os.getpid())
            try:
                process = subprocess.Popen(
                    [sys.executable, str(launch.entry), *map(str, numbers), str(folder)],
                    env=worker_environment(os.environ, launch.environment, rank, launch.size, folder),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # the terminal's Ctrl-C is for the parent, which stops the job
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        channel = Channel(ours)
        listener = threading.Thread(target=self._listen, args=(rank, channel), name=f"{_OURS}rank {rank}", daemon=True)
        listener.start()
        return _Worker(rank, process, channel, listener)

    def _watch(self) -> None:
        """Until somebody closes the group, report workers that end."""
        gone: set[int] = set()
        while not self._closing.wait(_POLL_SECONDS):
            for worker in self._workers:
                if worker.rank not in gone and worker.process.poll() is not None:
                    gone.add(worker.rank)
                    # what it said before comes first
                    worker.listener.join(1.0)
                    self._report(worker.rank, _how_it_ended(worker.process.returncode))

    def _report(self, rank: int, reason: str) -> None:
        self.events.put(Event(rank, None, reason))
        self._failed.set()

    def _end(self) -> None:
        if self._polite:
            self._ask_to_leave()
        seconds = self._launch.patience.end
        self._wait(seconds if self._polite else 0.0)
        for end_it in (subprocess.Popen.terminate, subprocess.Popen.kill):
            for worker in self._workers:
                end_it(worker.process)  # nothing happens to one that is gone
            self._wait(seconds)
        for worker in self._workers:
            worker.channel.hang_up()
            worker.listener.join()
            worker.channel.close()

    def _ask_to_leave(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(ChannelClosed, TimeoutError):
                worker.channel.send(Message("close", generation=self.generation), seconds=1.0)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))

    # the threads of the workers

    def _listen(self, rank: int, channel: Channel) -> None:
        while True:
            try:
                self.events.put(Event(rank, channel.receive()))
            except MessageError as error:
                self.events.put(Event(rank, None, f"sent a message that was refused: {error}"))
            except ChannelClosed:
                return


def _temporary_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _MAX_TEMPORARY_PATH else "/tmp"


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"left with code {code}"
    try:
        name = signal.Signals(-code).name
        hint = " (Linux does so when main memory runs out; its log says so)" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"
    except ValueError:
        return f"was ended by signal {-code}"
