"""Streaming at full size: what steps cost with blocks in host memory, and whether runs take the memory that was planned.

python benchmarks/bench_stream.py
python benchmarks/bench_stream.py --small    (a tiny model, on the CPU too: a trial of the script in seconds)

Weights are random. steps: evaluations by one model on the device and by the same model streamed, taking turns, timed by
events of the device. memory: clips sampled by the engine under several limits, measured from the moment when the weights
are in place, beside the plan. Checks: streamed and resident steps, and clips under all limits, are equal bit for bit.
"""

from __future__ import annotations

import argparse
import time
import traceback
from pathlib import Path

import pack  # noqa: F401
import torch
from report import write
from stream_memory import memory
from stream_setting import CHECK, full_size, tiny
from stream_steps import steps
from timing import clean

PARTS = {"steps": steps, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--layers", type=int, help="fewer blocks, for a small card")
    parser.add_argument("--small", action="store_true", help="a tiny model; nothing is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    setting = tiny(options.layers) if options.small else full_size(options.layers, options.rounds)
    every, complete = [], True
    for part in options.parts:
        start, rows = time.perf_counter(), []
        try:
            with torch.no_grad():
                for row in PARTS[part](setting):
                    print(f"{row.id}: {row.value:.6g} {row.unit}" + (f" ({row.bar})" if row.bar else ""), flush=True)
                    rows.append(row)
        except Exception:  # the other parts' figures are worth having
            traceback.print_exc()
            complete = False
        print(f"{part}: {time.perf_counter() - start:.0f} s")
        clean(setting.device)
        if not options.small:
            print(write(options.out, f"stream_{part}_2.3", rows))
        every += rows
    if not complete or any(row.unit == CHECK and row.bar == "1" and row.value != 1 for row in every):
        raise SystemExit("a part failed, or bits differ")


if __name__ == "__main__":
    main()
