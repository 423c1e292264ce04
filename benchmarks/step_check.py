"""Whether a forward of our transformer is right: against the same in plain torch, and against float32.

Any difference between two runs in bfloat16 grows to the rounding noise of the format within a few blocks, so whole runs
are compared by their error against float32, and with each other block by block, each fed with the plain run's input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import own_model
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.testing import cosine
from ltx2_engine.ltx2_core.transformer.model import Transformer
from own_model import Output, drawing, step_of
from report import Row
from torch import Tensor, nn


class WrongResult(SystemExit):
    """What is measured computes something else: there are no figures."""


@dataclass(frozen=True)
class Bar:
    """block_cosine: of each block's output, at least. error_ratio: to the plain run's errors, at most; None: not asked."""

    block_cosine: float
    error_ratio: AV[float] | None


# sound has so few values that its error varies more. Eight-bit numbers have an error of their own, reported, not judged
CLOSE = Bar(0.99999, AV(1.02, 1.1))
# fast rounds less often than plain torch in bfloat16, so it is elsewhere by as much as that is wrong
BARS = {"exact": CLOSE, "fast": Bar(0.9999, AV(1.02, 1.1)), "fp8": Bar(0.998, None)}


@dataclass(frozen=True)
class Call:
    """A call of a block."""

    args: tuple
    kwargs: dict[str, Any]
    output: Any


class Reference:
    """The exact forward in plain torch: what its blocks were given and gave, its output, and its error to float32."""

    def __init__(self, config: ModelConfig, model: Transformer, clip: ClipShape, device: torch.device):
        self.run = step_of(config, model, clip, drawing(device))
        self.calls: list[Call] = []
        with own_model.plain_torch(), _hooks(model.blocks, after=self._keep):
            self.output = self.run()
        with own_model.plain_torch(), _in_float32(model):
            self.wide = step_of(config, model, clip, drawing(device, torch.float32))()
        refuse_unless_finite("plain torch", self.output)
        refuse_unless_finite("float32", self.wide)

    def _keep(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        # tokens, state and keeps, without what other passes have read of the prompt: that is to be computed anew
        self.calls.append(Call(args[:3], kwargs, output))

    def errors(self, output: Output) -> list[float]:
        """Of video and sound, relative to the float32 run."""
        return [
            float((a.double() - b).norm() / b.norm())
            for a, b in zip(output, map(Tensor.double, self.wide), strict=True)
        ]


def check(mode: str, model: Transformer, reference: Reference) -> list[Row]:
    """Compare the model as it is now with the reference. Raises WrongResult where a bar is missed."""
    bar = BARS[mode]
    output = reference.run()
    refuse_unless_finite(mode, output)
    alike: list[float] = []
    for block, call in zip(model.blocks, reference.calls, strict=True):
        again = _leaves(block(*call.args, **call.kwargs))
        alike += (cosine(a, b) for a, b in zip(again, _leaves(call.output), strict=True))
    worst = lowest(alike)
    rows = [
        Row(f"{mode}: finite", 1.0, "1 = yes", "1"),
        Row(f"{mode}: worst block's cosine to plain torch", worst, "1", f">= {bar.block_cosine}"),
    ]
    right = worst >= bar.block_cosine
    limits = bar.error_ratio or AV(None, None)
    errors = zip(reference.errors(output), reference.errors(reference.output), strict=True)
    for stream, (own, plain), limit in zip(("video", "sound"), errors, (limits.video, limits.audio), strict=True):
        ratio = own / plain if plain else 1.0 + own
        rows.append(Row(f"{mode}: error to float32, {stream}", own, "1"))
        bound = "" if limit is None else f"<= {limit}"
        rows.append(Row(f"{mode}: error / plain torch's error, {stream}", ratio, "1", bound))
        right = right and (limit is None or ratio <= limit)
    if not right:
        figures = "".join(f"\n  {row.id}: {row.value:.6g} {row.bar}" for row in rows)
        raise WrongResult(f"{mode} computes something else than plain torch: no figures{figures}")
    return rows


def lowest(values: Sequence[float]) -> float:
    """The smallest one, NaN if there is one, which ``min`` does not see."""
    return float(torch.tensor(values, dtype=torch.float64).min())


def refuse_unless_finite(what: str, output: Output) -> None:
    if not all(bool(part.isfinite().all()) for part in output):
        raise WrongResult(f"{what}: the output is not finite: no figures")


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [leaf for field in fields(value) for leaf in _leaves(getattr(value, field.name))]
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, tuple | list) else []


@contextlib.contextmanager
def _hooks(
    blocks: nn.ModuleList, *, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for block in blocks:
            if before is not None:
                stack.callback(block.register_forward_pre_hook(before).remove)
            if after is not None:
                stack.callback(block.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def _in_float32(model: Transformer) -> Iterator[None]:
    """Inside the block, everything computes in float32; blocks have float32 weights only while they run."""
    outside = [child for name, child in model.named_children() if name != "blocks"]

    def convert(dtype: torch.dtype, block: nn.Module, *_: Any) -> None:
        block.to(dtype)

    for child in outside:
        child.float()
    try:
        with _hooks(model.blocks, before=partial(convert, torch.float32), after=partial(convert, own_model.DTYPE)):
            yield
    finally:
        for child in outside:
            child.to(own_model.DTYPE)
