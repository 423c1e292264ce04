"""Clips sampled by the engine under several limits of memory, beside what it planned."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.engine import LocalEngine
from ltx2_engine.ltx2_core.host import HostOutOfMemory
from ltx2_engine.ltx2_core.job import SampleJob
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.preflight import open_files
from ltx2_engine.ltx2_core.sampling.choice import SamplerChoice
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.text.context import Context
from own_model import PLAIN, Output, random_prompt
from random_model import random_weights
from report import Row
from stream_setting import CHECK, Setting, named, same_bits
from timing import GIB, clean

RUNS_IN_A_ROW = 5


@dataclass(frozen=True)
class Memory:
    """What PyTorch counts on a device: bytes of tensors, and bytes taken for them."""

    allocated: int = 0
    reserved: int = 0

    @classmethod
    def now(cls, device: torch.device) -> Memory:
        if device.type == "cpu":
            return cls()
        return cls(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))

    @classmethod
    def peak(cls, device: torch.device) -> Memory:
        if device.type == "cpu":
            return cls()
        return cls(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


class MeasuredEngine(LocalEngine):
    """Keeps its plan, and counts memory from the moment when the weights are in place.

    left_over: bytes that PyTorch had taken by then beyond those of tensors.
    """

    plan: Any = None
    left_over = 0

    def _plan(self, *args: Any) -> Any:
        self.plan = super()._plan(*args)
        return self.plan

    def _noise(self, job: SampleJob) -> Any:
        # the first thing that sampling does behind placing the weights
        placed = Memory.now(self.device)
        self.left_over = placed.reserved - placed.allocated
        clean(self.device)
        return super()._noise(job)


def memory(setting: Setting) -> Iterator[Row]:
    """Clips sampled under several limits: what was planned, what it took, and the same clips from all of them."""
    clips: dict[str, list[Output]] = {}
    clean(setting.device)
    print(f"allocated before: {Memory.now(setting.device).allocated / 2**20:.1f} MiB")
    with tempfile.TemporaryDirectory() as folder, random_weights(setting.device.type):
        checkpoint, encoder = setting.write_files(Path(folder))
        for limit in setting.limits:
            spec = ModelSpec.of(checkpoint, encoder, dtype="bfloat16", device=str(setting.device), limit_gib=limit)
            engine = MeasuredEngine(open_files(spec))
            try:
                yield from under_limit(setting, engine, clips, repeat=limit == setting.limits[0])
            finally:
                engine.close()
                del engine
                clean(setting.device)
    for what, outputs in clips.items():
        if len(outputs) > 1:
            yield same_bits(f"{what}, clips under {len(outputs)} limits", [outputs])


def under_limit(
    setting: Setting, engine: MeasuredEngine, clips: dict[str, list[Output]], *, repeat: bool
) -> Iterator[Row]:
    # what is allocated in a step does not depend on how many there are; the largest clip has one, to save time
    for clip, num_steps in ((setting.small, 2), (setting.large, 2), (setting.larger, 1)):
        what = f"{engine.files.spec.limit_gib:g} GiB, {named(clip)}"
        job = job_of(setting, clip, num_steps)
        try:
            latents = engine.sample(job).latents
        except HostOutOfMemory as refusal:
            print(f"{what}: {refusal}")
            yield Row(f"{what}: refused, as it does not fit", 1, CHECK)
            continue
        clips.setdefault(named(clip), []).append(list(latents.present()))
        yield from planned_and_measured(setting, engine, what)
        if repeat and clip is setting.small:
            yield from in_a_row(setting, engine, job, what)


def job_of(setting: Setting, clip: ClipShape, num_steps: int) -> SampleJob:
    context = Context(random_prompt(setting.model, setting.random).map(lambda features: features.cpu()))
    sigmas = tuple(torch.linspace(1, 0, num_steps + 1).tolist())
    return SampleJob(AVLatent(clip), context, None, AV(PLAIN, PLAIN), sigmas, SamplerChoice("euler"), seed=1)


def planned_and_measured(setting: Setting, engine: MeasuredEngine, what: str) -> Iterator[Row]:
    peak, plan = Memory.peak(setting.device), engine.plan
    if plan is None:  # nothing is planned on the CPU
        return
    (phase,) = (phase for phase in plan.phases if phase.name == "sampling")
    print(
        f"{what}: allocated {peak.allocated / GIB:.3f} of {phase.allocated / GIB:.3f} GiB, reserved "
        f"{peak.reserved / GIB:.3f} of {phase.reserved / GIB:.3f}; left over by placing {engine.left_over / GIB:.3f}\n{plan}"
    )
    yield Row(f"{what}: blocks on the device", plan.resident_blocks, f"of {plan.transformer.num_blocks}")
    yield Row(f"{what}: allocated", peak.allocated / GIB, "GiB")
    yield Row(f"{what}: allocated / planned", peak.allocated / phase.allocated, "1", "0.95 to 1.05")
    yield Row(f"{what}: reserved", peak.reserved / GIB, "GiB")
    yield Row(f"{what}: reserved / planned", peak.reserved / phase.reserved, "1", "0.90 to 1.10")


def in_a_row(setting: Setting, engine: MeasuredEngine, job: SampleJob, what: str) -> Iterator[Row]:
    """How much the memory of equal runs differs."""
    peaks, held = [], []
    for _ in range(RUNS_IN_A_ROW):
        engine.sample(job)
        peaks.append(Memory.peak(setting.device))
        held.append(Memory.now(setting.device))
    for name, sizes in (
        ("allocated at most", [one.allocated for one in peaks]),
        ("reserved at most", [one.reserved for one in peaks]),
        ("allocated afterwards", [one.allocated for one in held]),
    ):
        bar = "0" if name.startswith("allocated") else ""
        yield Row(
            f"{what}, {RUNS_IN_A_ROW} runs in a row: {name}, difference", (max(sizes) - min(sizes)) / 2**20, "MiB", bar
        )
