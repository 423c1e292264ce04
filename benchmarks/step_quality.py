"""What eight bits cost: the error of a forward and of a run of 8 steps against ours in bfloat16."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import pack  # noqa: F401
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.evaluate import split_evaluate
from ltx2_engine.ltx2_core.presets import DISTILLED_SIGMAS
from ltx2_engine.ltx2_core.sampling.choice import SamplerChoice
from ltx2_engine.ltx2_core.sampling.denoise import Denoiser
from ltx2_engine.ltx2_core.sampling.guidance import plan_passes
from ltx2_engine.ltx2_core.sampling.noise import SamplerNoise
from ltx2_engine.ltx2_core.sampling.samplers import SAMPLERS
from ltx2_engine.ltx2_core.transformer import attend
from ltx2_engine.ltx2_core.transformer.model import Transformer
from own_model import PLAIN, SIGMA, drawing, random_prompt, random_states
from report import Row
from shapes import Shape
from torch import Tensor

REFERENCE = "exact"
Found = dict[Shape, list[AV[Tensor]]]


class Quality:
    """Compares modes with the first one. setting: of bench_step.py."""

    def __init__(self, setting: Any):
        self._setting = setting
        self._reference: Found = {}

    def rows(self, mode: str, model: Transformer) -> Iterator[Row]:
        """Rows of the model as it is now; those of the reference are of two implementations of attention."""
        if mode == REFERENCE:
            self._reference = self._found(model)
            with attention("flash"):
                yield from self._compared("exact with flash attention", self._found(model))
        elif self._reference:
            yield from self._compared(mode, self._found(model))

    def _found(self, model: Transformer) -> Found:
        return {shape: forward_and_run(self._setting, model, shape) for shape in self._setting.shapes}

    def _compared(self, who: str, found: Found) -> Iterator[Row]:
        for shape, (velocity, latents) in found.items():
            wanted, sampled = self._reference[shape]
            named = zip(("video", "sound"), wanted.present(), velocity.present(), strict=True)
            for stream, want, got in named:
                yield Row(f"{shape}: {who}: error of a forward, {stream}", relative(got, want), "1")
            named = zip(("video", "sound"), sampled.present(), latents.present(), strict=True)
            for stream, want, got in named:
                yield Row(f"{shape}: {who}: PSNR after 8 steps, {stream}", psnr(got, want), "dB")
                yield Row(f"{shape}: {who}: standard deviation after 8 steps, {stream}", float(got.std()), "1")


def forward_and_run(setting: Any, model: Transformer, shape: Shape) -> list[AV[Tensor]]:
    """The velocity of a forward, and the latents of a run of 8 steps, each [1, T, C] float32."""
    draw = drawing(setting.device)
    states, prompt = random_states(setting.model, shape.clip, draw), random_prompt(setting.model, draw)
    guidance = AV(PLAIN, PLAIN)
    passes = plan_passes(guidance)
    evaluate = split_evaluate(model, states, passes, prompt, None, lambda: None)
    x = states.map(lambda state: state.latent)
    (velocity,) = evaluate(x, SIGMA, AV(True, True))
    choice = SamplerChoice("euler")
    denoise = Denoiser(evaluate, states, passes, guidance)
    noise = SamplerNoise(choice, 0, setting.device)
    sampled = SAMPLERS[choice.name](denoise, x, DISTILLED_SIGMAS, noise, choice, lambda *_: None)
    return [velocity.map(Tensor.float), sampled.map(Tensor.float)]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def psnr(got: Tensor, want: Tensor) -> float:
    """10 log10(range^2 / mean squared difference)"""
    difference = float((got - want).square().mean())
    return math.inf if difference == 0 else 10 * math.log10(float(want.max() - want.min()) ** 2 / difference)


@contextlib.contextmanager
def attention(implementation: str) -> Iterator[None]:
    """Inside the block, that implementation is tried first."""
    before = os.environ.get(attend.SWITCH)
    os.environ[attend.SWITCH] = implementation
    attend._choice.cache_clear()
    try:
        yield
    finally:
        del os.environ[attend.SWITCH]
        if before is not None:
            os.environ[attend.SWITCH] = before
        attend._choice.cache_clear()
