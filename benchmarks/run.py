"""Benchmarks one after the other, each in a process of its own.

python benchmarks/run.py step guided profile decode kernels
python benchmarks/run.py all --tiny
python benchmarks/run.py step --out FOLDER -- --shapes 512x768x121    (what stands behind -- goes to each of them)

Goes on where one fails, and says so at the end; then the plots are made where there is something to plot.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent

# name -> script and its options
BENCHMARKS = {
    "step": ("bench_step.py",),
    "guided": ("bench_step.py", "--guided"),
    "profile": ("bench_step.py", "--profile"),
    "kernels": ("bench_kernels.py",),
    "decode": ("bench_decode.py",),
    "ranks": ("bench_ranks.py",),
    "ranks_decode": ("bench_ranks_decode.py",),
    "ranks_load": ("bench_ranks_load.py",),
    "generate": ("bench_generate.py",),
    "generate_guided": ("bench_generate.py", "--flow", "guided"),
    "generate_hq": ("bench_generate.py", "--flow", "hq_two_stage", "--compare"),
    "stream": ("bench_stream.py",),
    "load": ("bench_load.py",),
    "load_diffusers": ("bench_load_diffusers.py",),
    "first_step": ("bench_first_step.py",),
    "enhance": ("bench_enhance.py",),
}
# how a benchmark is asked for a trial that takes seconds; the others have none
TRIALS = {"bench_stream.py": "--small", "bench_load_diffusers.py": "--tiny"}
TRIALS |= dict.fromkeys(
    (f"bench_{name}.py" for name in ("step", "kernels", "decode", "ranks", "ranks_decode", "ranks_load", "enhance")),
    "--tiny",
)


def command(name: str, out: Path, *, tiny: bool, others: Sequence[str]) -> list[str]:
    script, *options = BENCHMARKS[name]
    trial = [TRIALS[script]] if tiny else []
    return [sys.executable, str(HERE / script), *options, *trial, "--out", str(out), *others]


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--tiny", action="store_true", help="trials of those that have one")
    parser.add_argument("--out", type=Path, help="by default results/, and a temporary folder for trials")
    options = parser.parse_args(arguments[:cut])
    out = options.out or (Path(tempfile.mkdtemp()) if options.tiny else HERE / "results")
    names = list(BENCHMARKS) if "all" in options.names else list(dict.fromkeys(options.names))
    if options.tiny:
        names = [name for name in names if BENCHMARKS[name][0] in TRIALS]
    failed = []
    for name in names:
        call, start = command(name, out, tiny=options.tiny, others=arguments[cut + 1 :]), time.perf_counter()
        print(f"== {name}: {' '.join(call[1:])}", flush=True)
        code = subprocess.run(call, check=False).returncode
        print(
            f"== {name}: {time.perf_counter() - start:.0f} s, {'done' if code == 0 else f'failed ({code})'}", flush=True
        )
        if code:
            failed.append(name)
    if list(out.glob("*.json")):
        subprocess.run([sys.executable, str(HERE / "plots.py"), "--results", str(out)], check=False)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
