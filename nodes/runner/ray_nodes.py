"""Whole jobs over the machines of a Ray cluster (`ray_cluster.py`).

One actor in each bundle of a placement group runs jobs as any worker does; this process claims them, keeps the claims alive
and publishes.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .batch import FAILURES, POLL, Outcome, Report, check_holders, failed, give_back, next_claim, reason_of
from .claim import Claim, ClaimLost, Heartbeat
from .job_queue import JobQueue
from .ray_cluster import ActorLost, Actors, Bundles, Cluster, ClusterError, connected
from .remote import machine_text, request_text, unpack
from .session import Folders, RunnerHost

_LOG = logging.getLogger("ltx2.queue")

_STOP_SECONDS = 15.0


@dataclass
class _Run:
    """A job that an actor runs."""

    claim: Claim
    heartbeat: Heartbeat
    worker: int
    start: float = field(default_factory=time.monotonic)


@contextlib.contextmanager
def workers(cluster: Cluster, folders: Folders, *, metadata: bool = True) -> Iterator[Workers]:
    """Workers of a cluster, all of which are ready. Raises ClusterError."""
    with connected(cluster, cluster.count or 1) as connection:
        bundles = _bundles(cluster, connection.gpus_of_machines())
        facts = [machine_text(folders, metadata=metadata)] * bundles.count
        yield Workers(connection.actors(bundles, "jobs", facts))


def _bundles(cluster: Cluster, gpus_of_machines: list[int]) -> Bundles:
    """One for each worker: so many as there are GPUs for, or, without GPUs, machines."""
    there = sum(gpus_of_machines)
    gpus = min(there, 1) if cluster.gpus is None else cluster.gpus
    count = cluster.count or (there // gpus if gpus else len(gpus_of_machines)) or 1
    if gpus * count > there:
        raise ClusterError(f"{count} workers with {gpus} GPUs each were asked for; the cluster has {there} GPUs")
    return Bundles(count, gpus)


class Workers:
    """Actors that run jobs, one a bundle."""

    def __init__(self, actors: Actors):
        self._actors = actors

    def __len__(self) -> int:
        return len(self._actors)

    def submit(self, worker: int, request: str) -> Any:
        """What ``ended`` tells of when the worker has answered."""
        return self._actors.ask(worker, "run", request)

    def ended(self, running: list[Any], seconds: float) -> list[Any]:
        return self._actors.ended(running, seconds)

    def answer(self, ended: Any) -> bytes | None:
        """The bytes of an answer; None from a worker that has died, or failed as no job can make it fail."""
        try:
            return self._actors.answer(ended)
        except ActorLost as error:
            _LOG.warning("a worker has died: %s", error)
            return None

    def replace(self, worker: int) -> None:
        """Another actor in the bundle of one that has died."""
        self._actors.replace(worker)

    def stop(self, running: list[Any]) -> None:
        """Ask every worker to stop its job, and wait a while for those that run one."""
        for worker in range(len(self._actors)):
            self._actors.ask(worker, "stop")
        self._actors.ended(running, _STOP_SECONDS, count=len(running))


def serve(queue: JobQueue, workers: Workers, host: RunnerHost, report: Report, *, wait: bool = False) -> None:
    """``batch.serve`` with so many jobs at a time as there are workers. The job of a worker that dies is claimed again."""
    free, running = list(range(len(workers))), dict[Any, _Run]()
    try:
        while True:
            host.check_interrupt()
            while free and (claim := next_claim(queue)) is not None:
                begun = _begin(claim, queue, free[-1], report)
                if begun is not None:
                    run, request = begun
                    running[workers.submit(free.pop(), request)] = run
            if running:
                for ended in workers.ended(list(running), POLL):
                    run = running.pop(ended)
                    _end(run, workers, workers.answer(ended), report)
                    free.append(run.worker)
            elif not wait and queue.is_finished():
                return
            else:
                time.sleep(min(POLL, queue.heartbeat))
    finally:
        if running:
            workers.stop(list(running))
        for run in running.values():
            run.heartbeat.stop()
            give_back(run.claim, report)


def _begin(claim: Claim, queue: JobQueue, worker: int, report: Report) -> tuple[_Run, str] | None:
    """The run of a job and what to ask a worker; None for a job that has ended at once."""
    report(Outcome(claim.name, "running"))
    try:
        try:
            check_holders(claim.begin())
            request = request_text(claim.name, claim.workflow.read_bytes(), claim.settings())
        except FAILURES as error:
            report(failed(claim, reason_of(error)))
            return None
    except ClaimLost:
        report(Outcome(claim.name, "lost"))
        return None
    return _Run(claim, Heartbeat(claim, queue.heartbeat).start(), worker), request


def _end(run: _Run, workers: Workers, answer: bytes | None, report: Report) -> None:
    """Publish what a worker has answered; the job of a dead worker waits again."""
    try:
        if answer is None:
            give_back(run.claim, report, blame=True)
            workers.replace(run.worker)
            return
        outcome = _published(run.claim, answer)
    except ClaimLost:
        outcome = Outcome(run.claim.name, "lost")
    finally:
        run.heartbeat.stop()
    report(replace(outcome, seconds=time.monotonic() - run.start))


def _published(claim: Claim, data: bytes) -> Outcome:
    try:
        answer = unpack(data, claim.work)
        if answer.state != "done":
            return failed(claim, answer.reason or "stopped where it ran")
        published = claim.commit()
        return Outcome(claim.name, "done", files=tuple(published / name for name in answer.files))
    except FAILURES as error:
        return failed(claim, reason_of(error))
