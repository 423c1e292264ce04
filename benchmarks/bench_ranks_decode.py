"""Decoding one clip on several GPUs, a band of rows each, against one GPU: LTX-2.3's video VAE at full size.

python benchmarks/bench_ranks_decode.py
python benchmarks/bench_ranks_decode.py --tiny    (a tiny VAE, on the CPU too: a trial of the script; nothing is written)

Every rank is a process of its own, also the one of one GPU. Weights are random, N(0, 0.02), and so are latents, the same
ones on all ranks. The time of P GPUs is that of the slowest rank, from when all have begun: to the device, where pixels
stay, and to the host, where every rank writes its rows of the frames into memory that all share, as the engine does. There
are no figures where frames are not finite or are not those of one GPU: in float32, and of the measured clip in bfloat16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import pack  # noqa: F401
from ltx2_engine.ltx2_core.parallel.shared_memory import Segment
from ltx2_engine.ltx2_core.testing import cosine, relative_error
from ranks import gpus, run_ranks, shown_and_written, sizes_here, sizes_parser
from ranks_decode import Job, frames_place
from report import Row
from shapes import LARGE, Shape
from step_check import WrongResult, lowest
from timing import GIB
from torch import Tensor

BARS = {2: ">= 1.7", 4: ">= 3.0"}
# of frames from 0 to 1, in float32: a convolution of fewer rows may sum in another order
TOLERANCE = 2e-5
# of pixels from -1 to 1 in bfloat16, where it may be another algorithm
LEAST_COSINE = 0.9999


@dataclass(frozen=True)
class Visit:
    """What so many ranks gave. times: of every rank and repetition in milliseconds, by where the pixels went."""

    size: int
    times: dict[str, list[list[float]]]
    peak: int
    plan: str

    def slowest(self, where: str) -> float:
        """The median of the slowest rank's milliseconds."""
        return median(max(together) for together in zip(*self.times[where], strict=True))


@dataclass(frozen=True)
class Clips:
    """Memory for the frames of the check and of the measured clip, which all ranks write to."""

    check: Segment
    measured: Segment
    job: Job

    @classmethod
    @contextlib.contextmanager
    def reserved(cls, job: Job) -> Iterator[Clips]:
        places = [frames_place(Shape.parse(shape)) for shape in (job.check, job.shape)]
        with contextlib.ExitStack() as stack:
            yield cls(*(stack.enter_context(Segment.reserve(place.end)) for place in places), job)

    def clear(self) -> None:
        for frames in self.frames():
            frames.fill_(float("nan"))

    def frames(self) -> list[Tensor]:
        pairs = ((self.check, self.job.check), (self.measured, self.job.shape))
        return [segment.tensor(frames_place(Shape.parse(shape))) for segment, shape in pairs]


def visit(size: int, job: Job, clips: Clips) -> Visit:
    """Have so many ranks decode both clips. Raises SystemExit when one fails."""
    clips.clear()
    answers = run_ranks("ranks_decode.py", size, job, [clips.check.descriptor, clips.measured.descriptor])
    times = {where: [answer["times"][where] for answer in answers] for where in answers[0]["times"]}
    found = Visit(size, times, max(answer["peak"] for answer in answers), answers[0]["plan"])
    print(f"{gpus(size)}: {found.slowest('device'):.1f} ms, {found.slowest('host'):.1f} ms to the host ({found.plan})")
    return found


def same(size: int, job: Job, got: Clips, want: Clips) -> Iterator[Row]:
    """Rows of the comparison with one rank. Raises WrongResult."""
    (check, frames), (whole_check, whole) = got.frames(), want.frames()
    refuse_unless_finite(f"{gpus(size)}: {job.check}", check)
    error = relative_error(check, whole_check)
    row = Row(f"{job.check}, float32: {gpus(size)} to one, relative difference", error, "1", f"<= {TOLERANCE}")
    if not error <= TOLERANCE:
        raise WrongResult(f"{row.id}: {error:.2e}, allowed {TOLERANCE:.0e}: no figures")
    yield row
    refuse_unless_finite(f"{gpus(size)}: {job.shape}", frames)
    # a frame at a time: in float64 a whole clip takes gigabytes
    alike = lowest([cosine(2 * a - 1, 2 * b - 1) for a, b in zip(frames[0], whole[0], strict=True)])
    if not alike >= LEAST_COSINE:
        raise WrongResult(
            f"{job.shape}: {gpus(size)} to one: cosine is {alike:.6f}, at least {LEAST_COSINE}: no figures"
        )
    yield Row(f"{job.shape}: {gpus(size)} to one, cosine, worst frame", alike, "1", f">= {LEAST_COSINE}")


def refuse_unless_finite(what: str, frames: Tensor) -> None:
    if not bool(frames.isfinite().all()):
        raise WrongResult(f"{what}: rows are missing or not finite: no figures")


def rows_of(job: Job, visits: list[Visit]) -> Iterator[Row]:
    one = visits[0]
    for visited in visits:
        who = f"{job.shape}: {gpus(visited.size)}"
        for where in visited.times:
            yield Row(f"{who}, to the {where}: time", visited.slowest(where), "ms")
        yield Row(f"{who}: peak memory of a rank", visited.peak / GIB, "GiB")
    for visited in visits[1:]:
        for where in visited.times:
            ratio = one.slowest(where) / visited.slowest(where)
            what = f"{job.shape}: one GPU / {gpus(visited.size)}, to the {where}: time"
            yield Row(what, ratio, "1", BARS.get(visited.size, ""))


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = sizes_parser(__doc__, "ranks_decode_2.3", 7)
    parser.add_argument("--shape", type=Shape.parse, default=LARGE)
    parser.add_argument("--free", type=float, default=1024.0, metavar="GIB", help="that a rank's plan may count on")
    parser.add_argument("--chunk", type=int, default=0, help="frames of a piece in place of the plan's")
    options = parser.parse_args(arguments)
    job = Job(str(options.shape), str(Shape(192, 256, 49)), options.repeats, options.free, False, options.chunk)
    if options.tiny:
        job = Job(str(Shape(160, 64, 17)), str(Shape(96, 64, 17)), 1, options.free, True, options.chunk)
    sizes = sizes_here(options.sizes)
    rows = []
    with Clips.reserved(job) as whole, Clips.reserved(job) as bands:
        visits = [visit(1, job, whole)]
        for frames in whole.frames():
            refuse_unless_finite("1 GPU", frames)
        for size in sizes[1:]:
            visits.append(visit(size, job, bands))
            rows += same(size, job, bands, whole)
    rows += rows_of(job, visits)
    return shown_and_written(rows, options)


if __name__ == "__main__":
    main()
