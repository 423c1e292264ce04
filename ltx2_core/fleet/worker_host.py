"""The host of a worker: the parent shows progress and asks for stops, memory is that of the worker's own device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..host import PreviewSpec
from ..parallel.messages import MAX_LABEL
from ..parallel.worker_process import Job
from ..standalone import StandaloneHost

# more reports than that nobody sees
_REPORT_SECONDS = 0.05
# a rank that reads slowly while the others wait for it must not be taken for dead
_LIFE_SIGN_SECONDS = 5.0


class WorkerHost(StandaloneHost):
    """Host of one rank. Rank 0 tells of progress and makes previews; every rank tells in which stage it is."""

    name = "worker"

    def __init__(self, rank: int, device: str) -> None:
        super().__init__(progress="quiet")
        self._rank, self._device = rank, device
        self._running: Job | None = None
        self._preview: PreviewSpec | None = None
        self._displays = 0
        self._is_deaf = False

    @property
    def job(self) -> Job:
        assert self._running is not None, "no job runs"
        return self._running

    @contextlib.contextmanager
    def running(self, job: Job, preview: PreviewSpec | None) -> Iterator[None]:
        """The job that stops and progress belong to, and how its previews look."""
        self._running, self._preview = job, preview
        try:
            yield
        finally:
            self._running = None

    # stops

    def interrupted(self) -> bool:
        job = self._running
        return job is not None and job.interrupted()

    def check_interrupt(self) -> None:
        """Raise ``Interrupted`` if the parent asked to stop, except where only all ranks together may stop."""
        if self._running is not None and not self._is_deaf:
            self._running.check_interrupt()

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """Inside the block others than this host see to it that all ranks stop at the same place."""
        self._is_deaf = True
        try:
            yield
        finally:
            self._is_deaf = False

    # progress

    def progress(self, total: int, label: str, node_id: str | None = None) -> _Reports:
        self.job.enter_stage(label.encode("ascii", "replace").decode()[:MAX_LABEL])
        self._displays += 1
        return _Reports(self, self.job, self._displays, total, label, shows=self._rank == 0)

    def wants_preview(self, channels: int) -> PreviewSpec | None:
        fits = self._preview is not None and self._rank == 0 and len(self._preview.factors) == channels
        return self._preview if fits else None

    # devices

    def compute_devices(self) -> list[str]:
        """Its own alone: to ask about another one would take memory of it."""
        return list(dict.fromkeys([self._device, "cpu"]))


class _Reports:
    """A display in the parent, by number. shows: else the parent only hears that this rank lives."""

    def __init__(self, host: WorkerHost, job: Job, number: int, total: int, label: str, *, shows: bool) -> None:
        self._host, self._job, self._number, self._shows = host, job, number, shows
        self._total, self._label, self._value = total, label, 0
        self._told = float("-inf")

    def __enter__(self) -> _Reports:
        self._tell(None)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._shows:
            self._job.progress({"display": self._number, "done": True})

    def step(self, n: int = 1, picture: Any = None) -> None:
        self._report(self._value + n, None, picture)

    def to(self, value: int, total: int | None = None) -> None:
        self._report(value, total, None)

    def _report(self, value: int, total: int | None, picture: Any) -> None:
        self._value, self._total = value, self._total if total is None else total
        since = time.monotonic() - self._told
        if self._shows and (picture is not None or value >= self._total or since > _REPORT_SECONDS):
            self._tell(picture)
        elif since > _LIFE_SIGN_SECONDS:
            self._tell(None)
        self._host.check_interrupt()

    def _tell(self, picture: Any) -> None:
        self._told = time.monotonic()
        if not self._shows:
            self._job.tell("stage")
            return
        body = {"display": self._number, "label": self._label, "value": self._value, "total": self._total}
        self._job.progress(body, {} if picture is None else {"picture": torch.from_numpy(picture)})
