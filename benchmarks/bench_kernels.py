"""Every fused operation against its definition in plain torch and against the memory's bandwidth.

python benchmarks/bench_kernels.py
python benchmarks/bench_kernels.py --only qk_norm_rotary head_gate
python benchmarks/bench_kernels.py --tiny    (small tensors, on the CPU too: a trial of the script; nothing is written)
TRITON_INTERPRET=1 python benchmarks/bench_kernels.py --tiny    (with the twins, in Triton's interpreter)

Each time is that of the device: calls on several sets of arguments, together larger than its cache, are captured as a
graph and replayed; results stay until the end, so they are new memory too. Beside it stands what the host takes to issue
a call. The algorithmic bytes are each argument read and each result written once. An operation whose twin differs from its
definition on these arguments gets no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import kernel_table
import pack  # noqa: F401
import torch
from kernel_products import products
from kernel_table import (
    SIZES,
    TINY_PICTURE,
    TINY_SIZES,
    VARIANTS,
    Arguments,
    Size,
    Variant,
    leaves,
    moved_bytes,
)
from ltx2_engine import kernels
from own_model import DTYPE, Draw
from report import Row, write
from timing import clean, default_device, mark, milliseconds, settle

CACHE = 200 << 20
# what moves less is over before the memory is busy
BUSY = 64 << 20
# of the copy bandwidth, and of the definition's time; others have no bar there
SHARE_BARS = {"qk_norm_rotary": ">= 0.78", "pixel_norm_silu": ">= 0.75", "depth_to_space": ">= 0.75"}
SHARE_BAR = ">= 0.80"
GAIN_BARS = {"qk_norm_rotary": ">= 5"}


@dataclass(frozen=True)
class Setting:
    """How operations are run. spread: bytes that the sets of arguments fill at least. copied: of the copy for bandwidth."""

    device: torch.device
    sizes: Sequence[Size]
    spread: int
    copied: int
    replays: int

    def sizes_of(self, variant: Variant) -> Sequence[Size]:
        if variant.sizes is None:
            return self.sizes
        return (TINY_PICTURE,) if self.sizes is TINY_SIZES else variant.sizes


class Refused(Exception):
    """The twin does not do what the definition does."""


def operations() -> dict[str, Any]:
    """The operations by name; each has ``definition``, ``twin``, ``contract`` and ``warm_up``."""
    dispatch = getattr(kernels, "dispatch", None)
    return {} if dispatch is None else dispatch.OPERATIONS | products()


def check(operation: Any, make: Callable[[], Arguments]) -> bool:
    """Whether there is a twin for these arguments. Raises Refused where it differs from the definition."""
    args, kwargs = make()
    reason = operation.warm_up(*args, **kwargs)
    if reason == "failed its check":
        raise Refused(reason)
    if reason is not None:
        print(f"{operation.name}: no twin here: {reason}")
        return False
    found = operation.twin(*args, **kwargs)
    args, kwargs = make()
    wrong = operation.contract.difference(operation.definition(*args, **kwargs), found)
    if wrong is not None:
        raise Refused(wrong)
    return True


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as a graph; as it is where it cannot be one, which adds what the host takes."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = run()
    except RuntimeError as error:
        print(f"cannot be captured, so calls are issued one by one: {str(error).splitlines()[0]}")
        return run

    def replay(_keep: Any = results) -> None:
        graph.replay()

    return replay


def measured(setting: Setting, run: Callable[..., Any], sets: Sequence[Arguments]) -> tuple[float, float]:
    """Microseconds of a call on the device, and of issuing it; each call takes the next set."""

    def all_sets() -> list[Any]:
        return [run(*args, **kwargs) for args, kwargs in sets]

    all_sets()
    settle(setting.device)
    start = time.perf_counter()
    all_sets()
    issued = time.perf_counter() - start
    settle(setting.device)
    replay = captured(all_sets) if setting.device.type == "cuda" else all_sets
    replay()
    marks = [mark(setting.device)]
    for _ in range(setting.replays):
        replay()
        marks.append(mark(setting.device))
    settle(setting.device)
    each = median(milliseconds(*both) for both in pairwise(marks))
    return each * 1000 / len(sets), issued * 1e6 / len(sets)


def drawing_on(device: torch.device) -> Draw:
    """A function from shapes to random bfloat16 values, others at every call; the same sequence from each such function."""
    generator = torch.Generator(device).manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=DTYPE)


def bandwidth(setting: Setting) -> float:
    """Bytes a second of copying, read and written ones counted, by the faster of the driver and an elementwise kernel.

    The driver's copy from a device to itself reached 2.8 TB/s on an H200, where kernels reach 4.3.
    """
    source = torch.ones(setting.copied // 4, device=setting.device)
    target = torch.empty_like(source)

    def multiplied(x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, 1.0, out=target)

    fastest = min(measured(setting, copy, [((source,), {})] * 2)[0] for copy in (target.copy_, multiplied))
    return 2 * source.nbytes / fastest * 1e6


def rows(setting: Setting, variant: Variant, size: Size, operation: Any, copy: float) -> Iterator[Row]:
    """Figures of one variant at one size. Raises Refused."""
    clean(setting.device)

    def make() -> Arguments:
        return variant.make(size, drawing_on(setting.device))

    has_twin = check(operation, make)
    arguments = make()
    moved = moved_bytes(arguments, operation.definition(*arguments[0], **arguments[1]))
    held = sum(tensor.nbytes for tensor in leaves(arguments))
    sets = [arguments, *(make() for _ in range(max(1, setting.spread // held)))]
    what = f"{variant}: {size}"
    plain, _ = measured(setting, operation.definition, sets)
    yield Row(f"{what}: definition", plain, "us")
    if not has_twin:
        return
    clean(setting.device)
    fused, issued = measured(setting, operation.twin, sets)
    yield Row(f"{what}: twin", fused, "us")
    yield Row(f"{what}: twin, to issue", issued, "us")
    busy = moved >= BUSY
    bar = GAIN_BARS.get(variant.operation, "") if busy else ""
    yield Row(f"{what}: definition / twin", plain / fused, "1", bar)
    if variant.flop is not None:
        yield Row(f"{what}: rate", variant.flop(size) / fused / 1e6, "TFLOP/s")
        return
    yield Row(f"{what}: rate", moved / fused / 1000, "GB/s")
    bar = SHARE_BARS.get(variant.operation, SHARE_BAR) if busy else ""
    yield Row(f"{what}: share of copy bandwidth", moved / fused * 1e6 / copy, "1", bar)


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted({v.operation for v in VARIANTS}), help="these operations")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--name", default="kernels", help="of the result")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    device = default_device()
    setting = Setting(device, SIZES, CACHE, 1 << 30, options.replays)
    if options.tiny:
        setting = Setting(device, TINY_SIZES, 0, 1 << 20, 2)
    with torch.no_grad(), interpreted(options.tiny and device.type == "cpu"):
        found, refused = all_rows(setting, options.only)
    if found and not options.tiny:
        print(write(options.out, options.name, found))
    if refused:
        raise SystemExit("no figures of " + "; ".join(refused))
    return found


@contextlib.contextmanager
def interpreted(wanted: bool) -> Iterator[None]:
    """Twins run on the CPU where they can."""
    before = kernels.dispatch.interpreter
    kernels.dispatch.interpreter = wanted and os.environ.get("TRITON_INTERPRET") == "1"
    try:
        yield
    finally:
        kernels.dispatch.interpreter = before


def all_rows(setting: Setting, only: Sequence[str] | None) -> tuple[list[Row], list[str]]:
    """Figures of all variants, and which have none and why."""
    known, found, refused = operations(), [], []
    copy = bandwidth(setting)
    found.append(Row("copy", copy / 1e9, "GB/s"))
    print(f"copy: {copy / 1e9:.0f} GB/s")
    for variant in kernel_table.VARIANTS:
        if only and variant.operation not in only:
            continue
        if variant.operation not in known:
            print(f"{variant}: there is no such operation yet")
            continue
        for size in setting.sizes_of(variant):
            try:
                for row in rows(setting, variant, size, known[variant.operation], copy):
                    print(f"{row.id}: {row.value:.4g} {row.unit}" + (f" ({row.bar})" if row.bar else ""), flush=True)
                    found.append(row)
            except Refused as refusal:
                print(f"{variant}: {size}: refused: {refusal}", flush=True)
                refused.append(f"{variant}: {size} ({refusal})")
    return found, refused


if __name__ == "__main__":
    main()
