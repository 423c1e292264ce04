"""Fused kernels against their torch definitions, at the sizes of a real model, and against the bandwidth of a copy.

python benchmarks/bench_kernels.py [--tokens 15360] [--results benchmarks/results]

For each operation: microseconds of the definition and of the twin, and the twin's bytes a second (what it must read and
write at least) as a share of a copy's. Refuses to time an operation whose twin does not agree with its definition.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pack  # noqa: F401
import report
import torch
from ltx2_engine import kernels
from ltx2_engine.kernels import Rows
from ltx2_engine.kernels.dispatch import Operation

ROUNDS, WARM = 30, 5
STRENGTHS = {"cfg": 3.0, "stg": 1.0, "modality": 3.0, "rescale": 0.7}
LEVELS = {"sigma": 0.8, "sigma_next": 0.4, "sigma_down": 0.3, "alpha_ratio": 0.9, "fresh": 0.2}


@dataclass(frozen=True)
class Case:
    """One call. moved: bytes that it cannot avoid to read and write."""

    name: str
    operation: Operation
    args: tuple
    moved: int
    options: dict = field(default_factory=dict)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def block_cases(tokens: int, width: int, heads: int) -> Iterator[Case]:
    """Tokens of one stream: ``unit`` is one pass over them."""
    x, branch, unit = randn(1, tokens, width), randn(1, tokens, width), 2 * tokens * width
    values, index = randn(1, 3, 5, width), torch.randint(0, 3, (1, tokens), device="cuda")
    gate, *rows = (Rows(values[:, :, j], index) for j in range(5))
    one, two = ((rows[0], rows[1]),), ((rows[0], rows[1]), (rows[2], rows[3]))
    run, label = kernels.residual_norm_modulate, f" {width}"
    gated = {"branch": branch, "gate": gate}
    yield Case("norm, modulate" + label, run, (x, one, 1e-6), 2 * unit)
    yield Case("norm, modulate twice" + label, run, (x, two, 1e-6), 3 * unit)
    yield Case("residual" + label, run, (x, (), 1e-6), 3 * unit, gated)
    yield Case("residual, norm, modulate" + label, run, (x, one, 1e-6), 4 * unit, gated)
    yield Case("residual, norm, modulate twice" + label, run, (x, two, 1e-6), 5 * unit, gated)
    yield Case(
        "residual, norm, modulate, eight bits" + label, run, (x, one, 1e-6), 9 * unit // 2, {**gated, "quantize": True}
    )
    q, k, _ = randn(1, tokens, 3 * width).chunk(3, -1)
    weight, angle = randn(width), torch.rand(1, heads, tokens, width // heads // 2, device="cuda") * 6
    tables = angle.cos().bfloat16(), angle.sin().bfloat16()
    yield Case("queries and keys" + label, kernels.qk_norm_rotary, (q, k, weight, weight, *tables, 1e-6), 5 * unit)
    yield Case("norm, rotation" + label, kernels.norm_rotary, (q, weight, *tables, 1e-6), 3 * unit)
    yield Case("head gate" + label, kernels.head_gate, (x, randn(1, tokens, heads)), 2 * unit)
    yield Case("eight bits" + label, kernels.quantize_rows, (x,), 3 * unit // 2)
    yield Case("gelu, eight bits" + label, kernels.gelu_quantize, (randn(1, tokens, 4 * width),), 6 * unit)


def other_cases(tokens: int) -> Iterator[Case]:
    passes = randn(4, 1, tokens, 128)
    yield Case("guidance", kernels.guidance_combine, tuple(passes), 5 * 2 * passes[0].numel(), STRENGTHS)
    wide = randn(3, 1, tokens, 128, dtype=torch.float64)
    yield Case("res_2s update", kernels.res2s_update, tuple(wide), 4 * 8 * wide[0].numel(), LEVELS)
    for channels, frames, rows, columns in ((1024, 16, 24, 40), (128, 16, 384, 640)):
        x = randn(1, channels, frames, rows, columns)
        padded = randn(1, channels, frames + 2, rows, columns)[:, :, 2:]
        yield Case(f"pixel norm {channels}", kernels.pixel_norm_silu, (x, padded), 4 * x.numel())
    x, skip = randn(1, 4096, 16, 48, 80), randn(1, 1024, 16, 48, 80)
    moved = 2 * (2 * x.numel() + skip.numel())
    yield Case("depth to space", kernels.depth_to_space, (x, (2, 2, 2), skip), moved)


def microseconds(run: Callable[[], object]) -> float:
    """The median time of a call on the device."""
    for _ in range(WARM):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * ROUNDS)]
    for start, end in zip(marks[::2], marks[1::2], strict=True):
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in zip(marks[::2], marks[1::2], strict=True))
    return 1000 * times[ROUNDS // 2]


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of a copy that no cache holds."""
    source = randn(2**28)
    target = torch.empty_like(source)
    return 4 * source.numel() / microseconds(lambda: target.copy_(source))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=15360)
    parser.add_argument("--results", type=pathlib.Path, default=report.RESULTS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)

    copied = copy_bandwidth()
    print(f"copy: {copied / 1e6:.2f} TB/s")
    rows = [report.Row("copy", round(copied / 1e6, 3), "TB/s")]
    cases = (
        *block_cases(options.tokens, 4096, 32),
        *block_cases(options.tokens, 2048, 32),
        *other_cases(options.tokens),
    )
    for case in cases:
        wrong = case.operation.warm_up(*case.args, **case.options)
        if wrong is not None:
            print(f"{case.name}: not timed, {wrong}")
            continue
        slow, quick = (
            microseconds(lambda run=run, case=case: run(*case.args, **case.options))
            for run in (case.operation.definition, case.operation.twin)
        )
        share = case.moved / quick / copied
        print(f"{case.name}: {slow:.0f} us in torch, {quick:.0f} us fused, {100 * share:.0f} % of a copy's bandwidth")
        rows.append(report.Row(f"{case.name}, torch", round(slow, 1), "us"))
        rows.append(report.Row(f"{case.name}, fused", round(quick, 1), "us"))
        rows.append(report.Row(f"{case.name}, of a copy's bandwidth", round(share, 3), "", ">= 0.75"))
    report.write(options.results, "kernels", rows, packages=("triton",))


if __name__ == "__main__":
    main()
