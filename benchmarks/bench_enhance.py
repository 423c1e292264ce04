"""Prompt enhancement at full size: tokens a second of one GPU, tensor parallelism and Helix, beside the bytes that each reads.

python benchmarks/bench_enhance.py
python benchmarks/bench_enhance.py --ranks 1 4 --lengths 4096
python benchmarks/bench_enhance.py --tiny    (a tiny model, on the CPU too: a trial of the script; nothing is written)

Gemma 3 12B with random weights, bfloat16, one sequence. Every number of ranks is a start of so many processes, and every
rank holds the whole encoder, as in a fleet. A prompt of random tokens is read in pieces, then tokens are drawn one by one,
as ``enhance`` draws them; a token's time is the median, of the slowest rank. Bytes a token are counted, not measured
(``helix_traffic.py``). There are no figures where scores differ from those of transformers' own model on one GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.parallel.helix_traffic import table
from ranks import run_ranks, shown_and_written
from ranks_enhance import Plan, decoder_of, topologies_of
from report import Row


def speeds(plan: Plan, ranks: list[int], rows: list[Row]) -> str:
    """Tokens a second beside the counted bytes, in Markdown."""
    values = {row.id: row.value for row in rows}
    shown = [topology for count in ranks for topology in topologies_of(plan, count)]
    counted = table(decoder_of(plan), shown, list(plan.lengths)).splitlines()
    lines = [f"{counted[0]} tokens a second |", f"{counted[1]}--:|"]
    keys = [f"{topology.name} at {length:,} positions: speed" for length in plan.lengths for topology in shown]
    return "\n".join([*lines, *(f"{line} {values[key]:.1f} |" for line, key in zip(counted[2:], keys, strict=True))])


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 65536], help="positions of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="drawn and timed")
    parser.add_argument("--layers", type=int, default=48, help="fewer, for a small card")
    parser.add_argument("--limit", type=float, default=500.0, help="seconds that each number of ranks may take")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--name", default="enhance", help="of the result")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    plan = (
        Plan(6, (48, 80), 4, tiny=True)
        if options.tiny
        else Plan(options.layers, tuple(options.lengths), options.tokens)
    )
    here = torch.cuda.device_count() if torch.cuda.is_available() else max(options.ranks)
    ranks = [count for count in options.ranks if count <= here]
    for count in set(options.ranks) - set(ranks):
        print(f"{count} ranks need {count} GPUs, here are {here}: measured without")
    rows: list[Row] = []
    for count in ranks:
        # all of them have the first one's rows
        answer, *_ = run_ranks("ranks_enhance.py", count, plan, patience=options.limit)
        rows += [Row(**row) for row in answer["rows"]]
    shown_and_written(rows, options)
    print(speeds(plan, ranks, rows))
    return rows


if __name__ == "__main__":
    main()
