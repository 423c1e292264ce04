"""Steps of several guidance passes, as the engine evaluates them, against one forward."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.presets import GUIDANCE_PRESETS
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.transformer.model import Transformer
from own_model import PLAIN, drawing, step_of
from report import Row
from shapes import Shape
from step_check import WrongResult, refuse_unless_finite
from timing import Measured, allocated, clean, settle

STOP_AFTER = 0.7


def four(setting: Any, model: Transformer, who: str) -> Iterator[Row]:
    """Rows of the guided preset's four passes. Raises WrongResult where passes are not what they should be."""
    passes = preset("guided 2.3/2.5", (setting.stg_block,))
    weights = allocated(setting.device)
    yield from compared(setting, model, setting.guided, f"{who}, guided", passes, ("split",), weights, "<= 3.42")


def hq(setting: Any, model: Transformer, who: str) -> Iterator[Row]:
    """Rows of the HQ preset's first stage, its passes one after the other and at once. Raises WrongResult."""
    both, weights = ("split", "batched"), allocated(setting.device)
    yield from compared(setting, model, setting.stage_1, f"{who}, HQ stage 1", preset("hq"), both, weights, "<= 2.97")


class Stopped(Exception):
    """The user's Stop."""


def stop(setting: Any, model: Transformer, who: str) -> Iterator[Row]:
    """Rows of how long a Stop takes in a guided step of the largest clip, from the wish to when control is back, and to
    when the device is idle."""
    wished: list[float] = []

    def check() -> None:
        if wished and time.perf_counter() > wished[0]:
            raise Stopped

    guidance = preset("guided 2.3/2.5", (setting.stg_block,))
    run = step_of(
        setting.model, model, setting.stopped.clip, drawing(setting.device), guidance, graphed=True, check=check
    )
    run()
    settle(setting.device)
    wished.append(time.perf_counter() + STOP_AFTER)
    with contextlib.suppress(Stopped):
        while True:
            run()
    back = time.perf_counter()
    settle(setting.device)
    what = f"{setting.stopped}: {who}, 4 passes: stop"
    yield Row(f"{what}, control is back", back - wished[0], "s", "<= 1")
    yield Row(f"{what}, the device is idle", time.perf_counter() - wished[0], "s", "<= 1")


GUIDED = {"four": four, "hq": hq, "stop": stop}


def preset(name: str, stg_blocks: tuple[int, ...] = ()) -> StreamGuidance:
    """What a preset asks of video."""
    values = GUIDANCE_PRESETS[name]
    strengths = {key: float(values[f"video_{key}"]) for key in ("cfg", "stg", "modality", "rescale")}
    return StreamGuidance(**strengths, stg_blocks=stg_blocks)


def compared(
    setting: Any,
    model: Transformer,
    shape: Shape,
    name: str,
    guidance: StreamGuidance,
    evaluations: tuple[str, ...],
    weights: int,
    bar: str = "",
) -> Iterator[Row]:
    passes = len(plan_passes(AV(guidance, guidance)))
    wanted: dict[str, tuple[StreamGuidance, str]] = {f"{name}, one forward": (PLAIN, "split")}
    wanted |= {f"{name}, {passes} passes, {kind}": (guidance, kind) for kind in evaluations}
    measured: dict[str, Measured] = {}
    first: list[torch.Tensor] = []
    for what, (strengths, kind) in wanted.items():
        clean(setting.device)
        run = step_of(setting.model, model, shape.clip, drawing(setting.device), strengths, kind, graphed=True)
        measured[what], output = setting.watch.measure(run, weights, first_counts=True)
        refuse_unless_finite(what, output)
        # the next evaluation takes the memory in which this one's results lie
        first = first or [part.clone() for part in output]
        # every evaluation gives the unperturbed pass first
        if kind == "split" and not all(map(torch.equal, first, output[:2])):
            raise WrongResult(f"{what}: its first pass is not the plain forward: no figures")
        yield from measured[what].rows(f"{shape}: {what}")
    alone = measured.pop(f"{name}, one forward").median
    for what, one in measured.items():
        yield Row(f"{shape}: {what} / one forward", one.median / alone, "1", bar if "split" in what else "")
    if len(measured) == 2:
        split, batched = (one.median for one in measured.values())
        yield Row(f"{shape}: {name}, {passes} passes, split / batched", split / batched, "1", "<= 0.97")
