"""Times and memory of work on a device; on the CPU a clock stands in for events, and memory is not counted."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from report import Row

GIB = 1 << 30


def default_device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def mark(device: torch.device) -> Any:
    """A point in the device's work."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(before: Any, after: Any) -> float:
    return (after - before) * 1000 if isinstance(before, float) else before.elapsed_time(after)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def clean(device: torch.device) -> None:
    """Give back what nobody holds, and count peaks from here; nothing on the CPU, where neither is measured."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@dataclass
class Measured:
    """Milliseconds of repetitions, and the largest memory beside the weights in bytes."""

    times: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        return median(self.times)

    def add(self, other: Measured) -> None:
        self.times += other.times
        self.peak = max(self.peak, other.peak)

    def rows(self, what: str) -> list[Row]:
        return [Row(f"{what}: time", self.median, "ms"), Row(f"{what}: peak memory", self.peak / GIB, "GiB")]


@dataclass(frozen=True)
class Stopwatch:
    """How often a run is repeated: for ``seconds``, at least ``fewest`` times and at most ``most`` times.

    Two runs come first and do not count: the one that compiles or plans, and the one that tells how many fit.
    """

    device: torch.device
    seconds: float = 4.0
    fewest: int = 3
    most: int = 20

    def measure(self, run: Callable[[], Any], weights: int = 0, *, first_counts: bool = False) -> tuple[Measured, Any]:
        """Times of ``run``, and what it gave last. weights: bytes on the device that are not the run's.

        first_counts: count the memory of the first run too, for one that is captured then and has no tensors later.
        The host does not wait for the device between repetitions.
        """
        clean(self.device)
        run()
        settle(self.device)
        first = self._peak() if first_counts else 0
        clean(self.device)
        before = mark(self.device)
        run()
        after = mark(self.device)
        settle(self.device)
        count = int(self.seconds * 1000 / max(milliseconds(before, after), 1e-3))
        marks = [mark(self.device)]
        for _ in range(min(max(count, self.fewest), self.most)):
            given = run()
            marks.append(mark(self.device))
        settle(self.device)
        peak = max(self._peak(), first, weights) - weights
        return Measured([milliseconds(*pair) for pair in pairwise(marks)], peak), given

    def _peak(self) -> int:
        """Bytes that tensors took on the device at most; 0 on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
