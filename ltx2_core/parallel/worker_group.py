"""Jobs for a group of workers: one at a time, to all of them at once, with an answer of every one.

A group is started when a job needs it. After a failure that leaves it in an unknown state it is ended, and the next job
gets a fresh one, with the next generation's number.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace

from .job_run import JobRun, OnProgress, Watch, no_progress
from .messages import Message
from .processes import Launch, Processes

log = logging.getLogger("ltx2.parallel")


class WorkersBusy(RuntimeError):
    """A second job while one is running. It is refused, not queued: who shares a group takes turns outside of it."""


class StaleHandle(RuntimeError):
    """Something that a former generation of workers held, which ended with it."""


def _nothing() -> None:
    pass


class WorkerGroup:
    """``launch.size`` workers, started with the first job, ended by ``close``, with the last handle, or with the process."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._busy = threading.Lock()
        self._processes: Processes | None = None
        self._finalizer: weakref.finalize | None = None
        self._last_job = 0
        # of the processes that are there, or were there last
        self.generation = 0

    def start(self, watch: Watch = _nothing) -> int:
        """Have workers that are ready; the number of their generation. Errors and ``watch`` as for ``run``."""
        with self._one_at_a_time():
            self._ready_processes(watch)
            return self.generation

    def run(
        self,
        request: Message,
        *,
        generation: int | None = None,
        watch: Watch = _nothing,
        on_progress: OnProgress = no_progress,
    ) -> tuple[Message, ...]:
        """Give all workers one job and return their results in the order of ranks.

        request: a ``job``, whose generation and number are filled in. generation: the one that the request's handles are of.
        watch: called all the time, on_progress: with rank and message of each event; both in this thread, and what they
        raise stops the job on all workers, which live on, and is raised here.
        Raises WorkerError with rank and stage, Interrupted when all workers stopped by themselves, WorkersBusy and
        StaleHandle.
        """
        with self._one_at_a_time():
            self._check_generation(generation)
            processes = self._ready_processes(watch)
            self._last_job += 1
            request = replace(request, generation=processes.generation, job=self._last_job)
            return self._see_through(JobRun(processes, self._launch.patience, request, on_progress), watch)

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self._busy.locked()

    @property
    def alive(self) -> bool:
        """Whether there are workers that can take a job."""
        return self._processes is not None and self._processes.usable()

    def close(self, polite: bool = True) -> None:
        """End the workers; no process, thread or file is left when this returns. A later job starts fresh ones."""
        processes, self._processes = self._processes, None
        if self._finalizer is not None:
            self._finalizer.detach()
        if processes is not None:
            processes.close(polite)

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise WorkersBusy("the workers have a job: wait until it is done, or stop it")
        try:
            yield
        finally:
            self._busy.release()

    def _check_generation(self, generation: int | None) -> None:
        if generation is not None and not (self.alive and generation == self.generation):
            raise StaleHandle(f"the workers of generation {generation} have ended, and what they held with them")

    def _ready_processes(self, watch: Watch) -> Processes:
        if self._processes is not None and self._processes.usable():
            return self._processes
        self.close(polite=False)
        self.generation += 1
        self._processes = processes = Processes(self._launch, self.generation)
        # the group may be dropped without ``close``, and the interpreter may end
        self._finalizer = weakref.finalize(self, processes.close, False)
        self._see_through(JobRun(processes, self._launch.patience, None, no_progress), watch)
        log.info("%d workers are ready, generation %d", processes.size, self.generation)
        return processes

    def _see_through(self, run: JobRun, watch: Watch) -> tuple[Message, ...]:
        """The answers to a job, or to the start; where there is none, the workers end unless they can go on."""
        try:
            run.send()
            run.wait_for_answers(watch)
            return run.results()
        except BaseException:
            run.stop()
            if not run.repeatable():
                self.close(polite=False)
            raise
