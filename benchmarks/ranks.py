"""Processes that measure something together, one for each rank: how they are started, and how they keep time."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.parallel.collectives import GroupCollectives, join, leave
from ltx2_engine.ltx2_core.parallel.worker_environment import worker_environment
from report import Row, write
from timing import settle

HERE = Path(__file__).resolve().parent
SIZES = (1, 2, 4)
PATIENCE_SECONDS = 900
WARM_UPS = 2
_POLL_SECONDS = 0.1
# makes a rank print what its threads are doing
_TELL_WHERE = signal.SIGUSR1
_TELLING_SECONDS = 1
# of a failed rank's output
_LAST_LINES = 40


def run_ranks(
    script: str, size: int, job: Any, descriptors: Sequence[int] = (), patience: float = PATIENCE_SECONDS
) -> list[dict[str, Any]]:
    """Have so many ranks run a script of this folder, and return what each has answered.

    job: a dataclass of JSON values, for ``main_of_rank``. descriptors: files that the ranks inherit. patience: seconds. What
    rank 0 prints is shown when all are done. Raises SystemExit with what the failed ones printed when one fails, takes too
    long, or this process is interrupted or told to end; the others end.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
        command = [sys.executable, str(HERE / script), name, *map(str, descriptors)]
        logs = [folder / f"{rank}.log" for rank in range(size)]
        running: list[subprocess.Popen] = []
        try:
            for rank, log in enumerate(logs):
                environment = worker_environment(os.environ, {}, rank, size, folder)
                with log.open("wb") as output:
                    running.append(
                        subprocess.Popen(
                            command, env=environment, pass_fds=descriptors, stdout=output, stderr=subprocess.STDOUT
                        )
                    )
            with _told_to_end():
                failed = _wait(running, patience)
        finally:
            for process in running:
                process.kill()
                process.wait()
        if failed:
            raise SystemExit(
                "\n".join(f"rank {rank} of {size} {how}{_end(logs[rank])}" for rank, how in failed.items())
            )
        print(f"{script}, {gpus(size)}, took {time.perf_counter() - start:.0f} s{_end(logs[0])}", flush=True)
        return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


def _wait(running: list[subprocess.Popen], patience: float) -> dict[int, str]:
    """Ranks that failed until the first of them was seen, or that were not done in time, and which of both; else none.

    Those that were not done have printed where they were.
    """
    gives_up, how = time.monotonic() + patience, f"took more than {patience:g} s"
    try:
        while time.monotonic() < gives_up:
            codes = [process.poll() for process in running]
            failed = {rank: f"failed ({code})" for rank, code in enumerate(codes) if code}
            if failed or None not in codes:
                return failed
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        how = "was stopped"
    late = {rank: how for rank, process in enumerate(running) if process.poll() is None}
    for rank in late:
        running[rank].send_signal(_TELL_WHERE)
    time.sleep(_TELLING_SECONDS)
    return late


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """A wish that this process end is Ctrl-C to it, so that no rank is left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join([":", *(f"  {line}" for line in lines)]) if lines else ""


def gpus(size: int) -> str:
    return "1 GPU" if size == 1 else f"{size} GPUs"


def sizes_here(wanted: Sequence[int]) -> list[int]:
    """One, and those of the wanted numbers of GPUs that are there; on the CPU any number."""
    sizes = [1, *sorted({size for size in wanted if size > 1})]
    there = torch.cuda.device_count() or max(sizes)
    if there < max(sizes):
        print(f"there are {gpus(there)} only: measured without more")
    return [size for size in sizes if size <= there]


def sizes_parser(description: str | None, name: str, repeats: int) -> argparse.ArgumentParser:
    """The options of a benchmark that measures several GPUs against one. name, repeats: what they are by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of GPUs beside one")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--name", default=name, help="of the result")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser


def shown_and_written(rows: list[Row], options: argparse.Namespace) -> list[Row]:
    """The rows, printed; and written down unless they are of a trial."""
    for row in rows:
        print(f"{row.id}: {row.value:.6g} {row.unit}" + (f" ({row.bar})" if row.bar else ""))
    if not options.tiny:
        print(write(options.out, options.name, rows))
    return rows


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

    def slowest(self, values: list[float]) -> list[float]:
        """The largest of all ranks, value by value."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        return GroupCollectives().all_gather(mine).amax(0).tolist() if self.size > 1 else values

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
    faulthandler.register(_TELL_WHERE)
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
