"""Processes that measure something together, one for each rank: how they are started, and how they keep time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.parallel.collectives import GroupCollectives, join, leave
from ltx2_engine.ltx2_core.parallel.worker_environment import worker_environment
from timing import settle

HERE = Path(__file__).resolve().parent
PATIENCE_SECONDS = 900
WARM_UPS = 2
_POLL_SECONDS = 0.1


def run_ranks(script: str, size: int, job: Any, descriptors: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Have so many ranks run a script of this folder, and return what each has answered.

    job: a dataclass of JSON values, for ``main_of_rank``. descriptors: files that the ranks inherit. Raises SystemExit when
    one fails or takes too long; the others wait for it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
        command = [sys.executable, str(HERE / script), name, *map(str, descriptors)]
        running = [
            subprocess.Popen(command, env=worker_environment(os.environ, {}, rank, size, folder), pass_fds=descriptors)
            for rank in range(size)
        ]
        try:
            _wait(running)
        finally:
            for process in running:
                process.kill()
                process.wait()
        return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


def _wait(running: list[subprocess.Popen]) -> None:
    gives_up = time.monotonic() + PATIENCE_SECONDS
    while any(process.poll() is None for process in running):
        if any(process.poll() for process in running) or time.monotonic() > gives_up:
            break
        time.sleep(_POLL_SECONDS)
    ended = [process.poll() for process in running]
    for rank, code in enumerate(ended):
        if code:
            raise SystemExit(f"rank {rank} of {len(running)} failed ({code})")
    if None in ended:
        raise SystemExit(f"rank {ended.index(None)} of {len(running)} took more than {PATIENCE_SECONDS} s")


def gpus(size: int) -> str:
    return "1 GPU" if size == 1 else f"{size} GPUs"


def sizes_here(wanted: Sequence[int]) -> list[int]:
    """One, and those of the wanted numbers of GPUs that are there; on the CPU any number."""
    sizes = [1, *sorted({size for size in wanted if size > 1})]
    there = torch.cuda.device_count() or max(sizes)
    if there < max(sizes):
        print(f"there are {gpus(there)} only: measured without more")
    return [size for size in sizes if size <= there]


@dataclass(frozen=True)
class Rank:
    """This process among those that measure together."""

    rank: int
    size: int
    device: torch.device

    def meet(self) -> None:
        """All ranks go on from here at once."""
        if self.size > 1:
            GroupCollectives().all_gather(torch.zeros(1, device=self.device))
        settle(self.device)

    def times(self, run: Callable[[], Any], repeats: int) -> list[float]:
        """Milliseconds of each repetition, from when all ranks have begun to when this one is done."""
        times = []
        for _ in range(WARM_UPS + repeats):
            self.meet()
            start = time.perf_counter()
            run()
            settle(self.device)
            times.append((time.perf_counter() - start) * 1000)
        return times[WARM_UPS:]


def main_of_rank(work: Callable[[Rank, dict[str, Any]], dict[str, Any]]) -> None:
    """What a script for ``run_ranks`` does: join the others, do the job, and write down the answer.

    RANK, LOCAL_RANK and WORLD_SIZE are in the environment, the job is in FOLDER/job.json.
    """
    folder = Path(sys.argv[1])
    number, size, place = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", place) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    if size > 1:
        backend = "nccl" if on_gpu else "gloo"
        bound = device if on_gpu else None
        join(number, size, folder / "store", backend=backend, timeout=timedelta(minutes=5), device=bound)
    with torch.no_grad():
        answer = work(Rank(number, size, device), job)
    (folder / f"{number}.json").write_text(json.dumps(answer), encoding="utf-8")
    if size > 1:
        leave()
