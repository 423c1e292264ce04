"""Where the time of a step goes: how busy the device is, which kernels take most of it, and what the host does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from report import hardware
from timing import settle
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

STEPS = 2
MOST = 25


# by name, the microseconds of each call in some steps
Times = dict[str, list[float]]


def profile(what: str, run: Callable[[], Any], device: torch.device, path: Path | None) -> Times:
    """Profile some steps; print the text and write it to ``path``. On the CPU, operators stand in for kernels."""
    found, times = profiled(run, device)
    text = f"{what}; {hardware()}; torch {torch.__version__}; {STEPS} steps\n\n{found}\n"
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return times


def profiled(run: Callable[[], Any], device: torch.device) -> tuple[str, Times]:
    on_gpu = device.type == "cuda"
    for _ in range(2):
        run()
    settle(device)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(STEPS):
            run()
        settle(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = list(profiler.events())
    kernels = [event for event in events if event.device_type == wanted and not event.is_user_annotation]
    busy, span = covered((event.time_range.start, event.time_range.end) for event in kernels)
    lines = [
        f"device busy: {busy / span:.2%} of {span / 1000 / STEPS:.1f} ms a step",
        f"host, operators alone: {_own_host_time(events) / 1000 / STEPS:.1f} ms a step",
        f"kernels: {len(kernels) / STEPS:.0f} a step",
        "",
        f"{'share':>7} {'ms a step':>10} {'calls':>7}  kernel",
    ]
    times: Times = defaultdict(list)
    for event in kernels:
        times[event.name].append(event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total)
    total = sum(map(sum, times.values()))
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:MOST]:
        lines.append(
            f"{sum(each) / total:7.2%} {sum(each) / 1000 / STEPS:10.3f} {len(each) / STEPS:7.0f}  {name[:120]}"
        )
    return "\n".join(lines), times


def covered(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """How much the intervals cover together, and from the first one's start to the last one's end."""
    ordered = sorted(intervals)
    start = end = ordered[0][0]
    busy = 0.0
    for first, last in ordered:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy, end - start


def _own_host_time(events: Iterable[Any]) -> float:
    return sum(event.self_cpu_time_total for event in events if event.device_type == DeviceType.CPU)
