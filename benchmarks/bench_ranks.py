"""Steps of LTX-2.3 on several GPUs against one: forwards that share tokens, guided steps in every topology, and 8 steps.

python benchmarks/bench_ranks.py
python benchmarks/bench_ranks.py --tiny    (a tiny model, on the CPU too: a trial of the script; nothing is written)

Every rank is a process of its own, also the one of one GPU. Weights are random, N(0, 0.02), the same ones on all ranks. The
time of P GPUs is that of the slowest rank, from when all have begun; each step is measured launch by launch and, where that
works, as CUDA graphs, and the faster of both counts. There are no figures where results are not finite, are constant, or are
not the same bits on all ranks and twice; the latents of 8 steps are compared with those of one GPU, whose own difference
between two implementations of attention is the measure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pack  # noqa: F401
from ranks import gpus, run_ranks, shown_and_written, sizes_here, sizes_parser
from ranks_step import Job
from report import Row
from safetensors.torch import load_file
from shapes import Shape
from step_check import WrongResult
from step_quality import psnr
from timing import GIB

TOPOLOGIES = ["1x2", "2x1", "1x4", "2x2", "4x1"]
SMALL, GUIDED, LARGE = (str(Shape(*size, 121)) for size in ((512, 768), (768, 1280), (1024, 1536)))
# by shape, guided or not, and number of GPUs
BARS = {
    (SMALL, False): {2: ">= 1.70", 4: ">= 2.9"},
    (LARGE, False): {2: ">= 1.85", 4: ">= 3.5"},
    (GUIDED, True): {2: ">= 1.80", 4: ">= 3.3"},
}
BLOCKS, TINY_BLOCKS = 48, 3
NAMES = {"nccl": "exchanges through NCCL", "meetings": "exchanges by copy engines"}
# dB that more GPUs may lose against another attention on one
WORSE = 1.0


@dataclass(frozen=True)
class Visit:
    """What so many ranks gave: by case the answers of all ranks."""

    size: int
    steps: dict[str, list[dict[str, Any]]]
    quality: list[dict[str, str]]

    def slowest(self, case: str) -> float:
        """The median of the slowest rank's milliseconds."""
        return median(max(together) for together in zip(*(one["times"] for one in self.steps[case]), strict=True))

    def fastest(self, begins: str) -> tuple[str, float]:
        """The fastest of the cases with that shape."""
        found = {case: self.slowest(case) for case in self.steps if f"{case} ".startswith(f"{begins} ")}
        best = min(found, key=lambda case: found[case])
        return best, found[best]


def visit(size: int, job: Job) -> Visit:
    answers = run_ranks("ranks_step.py", size, job)
    found = Visit(
        size,
        {case: [answer["steps"][case] for answer in answers] for case in answers[0]["steps"]},
        [answer["quality"] for answer in answers],
    )
    for case, given in found.steps.items():
        _refuse(f"{case}, {gpus(size)}", {one["digest"] for one in given})
    for what in ("cudnn", "cudnn again"):
        _refuse(f"8 steps, {gpus(size)}", {one[what] for one in found.quality} | {found.quality[0]["cudnn"]})
    return found


def _refuse(what: str, digests: set[str]) -> None:
    """Raise WrongResult unless all have the same bits, which are of numbers that differ."""
    if len(digests) > 1 or digests & {"not finite", "constant"}:
        raise WrongResult(f"{what}: {', '.join(sorted(digests))}: no figures")


def rows_of(job: Job, visits: list[Visit]) -> Iterator[Row]:
    for visited in visits:
        for case, given in visited.steps.items():
            yield Row(f"{case}: {gpus(visited.size)}: time", visited.slowest(case), "ms")
            yield Row(
                f"{case}: {gpus(visited.size)}: peak memory of a rank",
                max(one["peak"] for one in given) / GIB,
                "GiB",
            )
    yield from exchanges(job, visits[1:])
    for shape, topologies in job.cases:
        what = f"{shape}, {'4 passes' if topologies else 'one forward'}"
        _, alone = visits[0].fastest(shape)
        for visited in visits[1:]:
            case, time = visited.fastest(shape)
            bar = BARS.get((shape, bool(topologies)), {}).get(visited.size, "")
            yield Row(
                f"{what}: one GPU / {gpus(visited.size)} ({case.removeprefix(shape).strip()})", alone / time, "1", bar
            )


def exchanges(job: Job, visits: list[Visit]) -> Iterator[Row]:
    """What was counted in captured forwards: three exchanges a block, and one behind them. None is for a table."""
    expected = 3 * (TINY_BLOCKS if job.tiny else BLOCKS) + 1
    for visited in visits:
        for case, given in visited.steps.items():
            for one in given:
                if "nccl" in one and one["nccl"] + one["meetings"] != expected:
                    raise WrongResult(f"{case}: {one['nccl']} and {one['meetings']} exchanges, expected {expected}")
            for what, name in NAMES.items():
                if what in given[0]:
                    yield Row(f"{case}: {gpus(visited.size)}: {name}", given[0][what], "1")


def quality_rows(job: Job, visits: list[Visit]) -> Iterator[Row]:
    """PSNR of latents after 8 steps against one GPU, beside that of another attention."""

    def latents(size: int, what: str) -> dict[str, Any]:
        return load_file(Path(job.results) / f"{size} {what}.safetensors")

    want, flash = latents(1, "cudnn"), latents(1, "flash")
    for stream, wanted in want.items():
        yield Row(f"{job.quality}: standard deviation after 8 steps, {stream}", float(wanted.std()), "1")
        least = psnr(flash[stream], wanted)
        yield Row(f"{job.quality}: PSNR after 8 steps, {stream}, flash attention on one GPU", least, "dB")
        for visited in visits[1:]:
            got = psnr(latents(visited.size, "cudnn")[stream], wanted)
            who = f"{job.quality}: PSNR after 8 steps, {stream}, {gpus(visited.size)}"
            yield Row(who, got, "dB", f">= {least - WORSE:.1f}")


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = sizes_parser(__doc__, "ranks_2.3", 5)
    parser.add_argument("--profile", action="store_true", help="count what captured forwards exchange")
    options = parser.parse_args(arguments)
    sizes = sizes_here(options.sizes)
    with tempfile.TemporaryDirectory() as results:
        texts = str(options.out) if options.profile else ""
        job = Job([(SMALL, []), (LARGE, []), (GUIDED, TOPOLOGIES)], SMALL, options.repeats, False, results, texts)
        if options.tiny:
            small, other = str(Shape(96, 64, 17)), str(Shape(64, 96, 17))
            job = Job([(small, []), (other, TOPOLOGIES)], small, 1, True, results, texts)
        visits = [visit(size, job) for size in sizes]
        rows = [*rows_of(job, visits), *quality_rows(job, visits)]
    return shown_and_written(rows, options)


if __name__ == "__main__":
    main()
