"""Loading LTX-2.3 on every GPU of a host: each reads all of the files, or its share and is given the rest by the others.

python benchmarks/bench_ranks_load.py
python benchmarks/bench_ranks_load.py --tiny    (a tiny model, on the CPU too: a trial of the script; nothing is written)

Every rank is a process of its own. Files are random, written once and read from the page cache; a load lasts from when all
ranks have begun until the slowest has all weights, and the first one, which touches host memory, is not counted. There are no
figures where a rank holds other bits than a single one that has read all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import pack  # noqa: F401
from random_files import write_lora, write_transformer
from ranks import gpus, run_ranks, shown_and_written, sizes_here, sizes_parser
from ranks_load import ALONE, CASES, SHARED, Job
from report import Row
from step_check import WrongResult
from temporary import temporary_folder


@dataclass(frozen=True)
class Visit:
    """What so many ranks gave, by case and way of reading."""

    size: int
    answers: list[dict[str, Any]]

    def bits(self, case: str) -> set[str]:
        return {
            bits
            for answer in self.answers
            for how in (ALONE, SHARED)
            for bits in answer.get(f"{case}, {how}", {"bits": []})["bits"]
        }

    def slowest(self, case: str, how: str) -> float:
        """The median of the slowest rank's seconds."""
        times = [answer[f"{case}, {how}"]["seconds"] for answer in self.answers]
        return median(max(together) for together in zip(*times, strict=True))


def rows_of(visits: list[Visit]) -> Iterator[Row]:
    for case in CASES:
        if len(bits := set.union(*(visited.bits(case) for visited in visits))) != 1:
            raise WrongResult(f"{case}: {len(bits)} different results: no figures")
        for visited in visits:
            who = f"{case}: {gpus(visited.size)}"
            alone = visited.slowest(case, ALONE)
            yield Row(f"{who}, {ALONE}", alone, "s")
            if visited.size > 1:
                shared = visited.slowest(case, SHARED)
                yield Row(f"{who}, {SHARED}", shared, "s")
                yield Row(f"{who}, shared / alone", shared / alone, "1")


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = sizes_parser(__doc__, "ranks_load_2.3", 3)
    parser.add_argument("--rank", type=int, default=384, help="of the LoRA")
    options = parser.parse_args(arguments)
    with temporary_folder() as folder:
        job = Job(str(folder), options.repeats, options.tiny)
        write_transformer(job.transformer, job.config, job.model, "2.3")
        write_lora(job.lora, job.model, 4 if options.tiny else options.rank)
        visits = [Visit(size, run_ranks("ranks_load.py", size, job)) for size in sizes_here(options.sizes)]
    return shown_and_written(list(rows_of(visits)), options)


if __name__ == "__main__":
    main()
