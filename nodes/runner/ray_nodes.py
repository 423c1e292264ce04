"""Whole jobs over the machines of a Ray cluster that an administrator runs. The only file that imports Ray.

One actor in each bundle of a placement group runs jobs as any worker does; this process claims them, keeps the claims alive
and publishes. Only text and bytes are given to actors and come from them (`remote.py`). Ray pickles its own envelopes and
the few lines of the actor's class, whose first call, its constructor, places the pack.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .batch import FAILURES, POLL, Outcome, Report, check_holders, failed, give_back, next_claim, reason_of
from .claim import Claim, ClaimLost, Heartbeat
from .job_queue import JobQueue
from .remote import machine_text, request_text, unpack
from .session import Folders, RunnerHost

_LOG = logging.getLogger("ltx2.queue")

LOCAL = "local"
_START_SECONDS = 300.0
_STOP_SECONDS = 15.0
PACK = Path(__file__).resolve().parents[2]


class ClusterError(RuntimeError):
    """Ray is not installed, its cluster cannot be reached, or it has not what was asked for."""


@dataclass(frozen=True)
class Cluster:
    """What is asked of a cluster. address: its own, or ``local`` for one on this machine that ends with this process.

    workers: how many; None for one a GPU share, or, without GPUs, one a machine. gpus: of one worker; None for 1 where
    there are any.
    """

    address: str
    workers: int | None = None
    gpus: int | None = None


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
    ray = _ray()
    try:
        if cluster.address == LOCAL:
            count = cluster.workers or 1
            ray.init(LOCAL, num_cpus=count, include_dashboard=False, log_to_driver=False, logging_level="warning")
        else:
            ray.init(cluster.address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no Ray cluster at {cluster.address!r}: {error}") from error
    try:
        yield Workers(ray, cluster, machine_text(folders, metadata=metadata))
    finally:
        # with it go the placement group and the actors, which belong to this process
        ray.shutdown()


def _ray() -> Any:
    # read when Ray is imported, and handed to what it starts
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise ClusterError(
            "Ray is not installed here: pip install 'ltx2-engine[ray]'. Without it, `ltx2 batch --join DIR` on every machine "
            "does the same where they share a folder"
        ) from error
    return ray


class Workers:
    """Actors that run jobs, one a bundle."""

    def __init__(self, ray: Any, cluster: Cluster, machine: str):
        """Returns when all are ready. Raises ClusterError."""
        from ray.util.placement_group import placement_group

        self._ray, self._machine = ray, machine
        gpus, count = _sizes(ray, cluster)
        bundle: dict[str, float] = {"CPU": 1, **({"GPU": gpus} if gpus else {})}
        self._group = placement_group([bundle] * count, strategy="SPREAD")
        if not self._group.wait(_START_SECONDS):
            raise ClusterError(
                f"the cluster has no room for {count} workers of {bundle} within {_START_SECONDS:g} s; it has "
                f"{ray.cluster_resources()}. Ask for fewer: --nodes, --gpus"
            )
        self._actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_concurrency=2)(_node_class())
        self._actors = [self._start(index) for index in range(count)]
        try:
            ray.get([actor.ready.remote() for actor in self._actors], timeout=_START_SECONDS)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"a worker cannot begin: {error}") from error

    def __len__(self) -> int:
        return len(self._actors)

    def submit(self, worker: int, request: str) -> Any:
        """What ``ended`` tells of when the worker has answered."""
        return self._actors[worker].run.remote(request)

    def ended(self, running: list[Any], seconds: float) -> list[Any]:
        return self._ray.wait(running, num_returns=1, timeout=seconds)[0]

    def answer(self, ended: Any) -> bytes | None:
        """The bytes of an answer; None from a worker that has died, or failed as no job can make it fail."""
        try:
            return self._ray.get(ended)
        except self._ray.exceptions.RayError as error:
            _LOG.warning("a worker has died: %s", error)
            return None

    def replace(self, worker: int) -> None:
        """Another actor in the bundle of one that has died."""
        self._ray.kill(self._actors[worker])
        self._actors[worker] = self._start(worker)

    def stop(self, running: list[Any]) -> None:
        """Ask every worker to stop its job, and wait a while for those that run one."""
        for actor in self._actors:
            actor.stop.remote()
        if running:
            self._ray.wait(running, num_returns=len(running), timeout=_STOP_SECONDS)

    def _start(self, index: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        return self._actor.options(scheduling_strategy=place).remote(str(PACK), self._machine)


def _sizes(ray: Any, cluster: Cluster) -> tuple[int, int]:
    """GPUs of a worker, and how many workers."""
    there = int(ray.cluster_resources().get("GPU", 0))
    gpus = min(there, 1) if cluster.gpus is None else cluster.gpus
    machines = sum(1 for node in ray.nodes() if node["Alive"])
    count = cluster.workers or (there // gpus if gpus > 0 else machines) or 1
    if count < 1 or gpus < 0 or gpus * count > there:
        raise ClusterError(f"{count} workers with {gpus} GPUs each were asked for; the cluster has {there} GPUs")
    return gpus, count


def _node_class() -> type:
    """The class of an actor. Defined in a function, so that Ray sends its lines: a worker cannot import the pack by name."""

    class Node:
        def __init__(self, pack: str, machine: str):
            import pathlib
            import sys
            import types

            if pathlib.Path(pack).is_dir():
                package = types.ModuleType("ltx2_engine")
                package.__path__ = [pack]
                sys.modules["ltx2_engine"] = package
            from ltx2_engine.nodes.runner.remote import RemoteNode

            self.node = RemoteNode(machine)

        def ready(self) -> bool:
            return True

        def run(self, request: str) -> bytes:
            return self.node.run(request)

        def stop(self) -> None:
            self.node.stop()

    return Node


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
