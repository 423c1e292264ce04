"""Pictures of results: the time of a step over the tokens, and how near the fused operations come to the memory.

python benchmarks/plots.py    reads results/*.json, writes PNG files beside them

Needs matplotlib, which nothing else here does; without it, it says so and makes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from report import RESULTS
from shapes import Shape

# rows of bench_step.py and of bench_kernels.py
STEP = re.compile(r"^(?P<shape>\d+x\d+x\d+): (?P<who>[^:]+): time$")
SHARE = re.compile(r"^(?P<what>.+): share of copy bandwidth$")

Curves = dict[str, list[tuple[int, float]]]


def step_curves(result: dict[str, Any]) -> Curves:
    """For each who was measured at some shapes, (video tokens, milliseconds) in order of tokens."""
    curves: Curves = {}
    for row in result["rows"]:
        found = STEP.match(row["id"])
        if found:
            point = Shape.parse(found["shape"]).video_tokens, row["value"]
            curves.setdefault(found["who"], []).append(point)
    return {who: sorted(points) for who, points in curves.items()}


def shares(result: dict[str, Any]) -> dict[str, float]:
    """Share of the copy bandwidth of each operation and size."""
    found = {SHARE.match(row["id"]): row["value"] for row in result["rows"]}
    return {match["what"]: value for match, value in found.items() if match}


def plot_steps(curves: Curves, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for who, points in curves.items():
        own = who.startswith("ours")
        axes.plot(
            *zip(*points, strict=True), marker="o", label=who, linewidth=2 if own else 1.2, ls="-" if own else "--"
        )
    axes.set(xscale="log", yscale="log", xlabel="video tokens", ylabel="milliseconds", title=title)
    for axis, marks in ((axes.xaxis, sorted({x for points in curves.values() for x, _ in points})), (axes.yaxis, None)):
        if marks:
            axis.set_ticks(marks)
        axis.set_major_formatter("{x:.0f}")
        axis.set_minor_formatter("" if marks else "{x:.0f}")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_shares(values: dict[str, float], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.2 * len(values)), layout="constrained")
    axes = figure.subplots()
    for size in dict.fromkeys(name.rpartition(": ")[2] for name in values):
        own = [name for name in values if name.endswith(f": {size}")]
        axes.barh([list(values).index(name) for name in own], [values[name] for name in own], label=size)
    axes.set_yticks(range(len(values)), [name.rpartition(": ")[0] for name in values], fontsize=7)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("share of the bandwidth of a copy")
    axes.legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def plots(folder: Path) -> list[Path]:
    """Write what the results in the folder can be drawn as; returns the files."""
    written = []
    for source in sorted(folder.glob("*.json")):
        result = json.loads(source.read_text(encoding="utf-8"))
        path = source.with_suffix(".png")
        title = f"{result['hardware']}, torch {result['versions']['torch']}"
        curves, values = step_curves(result), shares(result)
        # a curve needs two points: other benchmarks' rows may look like one
        curves = {who: points for who, points in curves.items() if len(points) > 1}
        if source.stem.startswith("step") and curves:
            plot_steps(curves, f"One forward of LTX-2.3, {title}", path)
        elif values:
            plot_shares(values, f"Fused operations, {title}", path)
        else:
            continue
        written.append(path)
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    for path in plots(options.results):
        print(path)


if __name__ == "__main__":
    main()
