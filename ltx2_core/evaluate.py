"""Evaluation of guidance passes by the transformer: what is constant for a run is built once, here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import runs_fused
from .av import AV
from .conditioning.attention import attention_bias
from .conditioning.state import LatentState
from .graphs import Graphs, Run
from .parallel.context import SINGLE, ParallelContext
from .parallel.groups import ONE_GROUP, PassGroups
from .parallel.sequence import shard
from .sampling.denoise import Evaluate
from .sampling.guidance import GuidancePass
from .sampling.warm_up import some_values
from .transformer.inputs import Pass, Perturbation, StreamInput, Timesteps, plan_keeps
from .transformer.lanes import ONE_LANE, Lanes
from .transformer.model import Transformer
from .transformer.rope import CrossRotary, Rotary


def batched_evaluate(
    model: Transformer,
    states: AV[LatentState],
    passes: Sequence[GuidancePass],
    positive: AV[Tensor],
    negative: AV[Tensor] | None,
    check: Callable[[], None],
    *,
    graphed: bool = False,
    parallel: ParallelContext = SINGLE,
    groups: PassGroups = ONE_GROUP,
) -> Evaluate:
    """An evaluation of all passes in one model call, stacked on the batch dimension, pass-major.

    positive, negative: text features of the prompts, [1, S, width] on the model's device and in its dtype.
    ``check`` is called before every block and may raise to stop. graphed: capture it as ``graphs.Graphs``, for weights that
    stay where they are. parallel: the ranks that evaluate it together, each of which is given and returns all tokens.
    groups: one, as the passes are not taken apart.

    Nothing in the returned function waits for the device: levels, masks and tables are built now.
    """
    assert groups.count == 1, "batched passes belong to one group"
    prompts = _project(model, states, positive, negative)
    contexts = states.map(lambda _, *both: torch.cat([both[one.negative] for one in passes]), *prompts)
    templates = _templates(model, states, contexts, len(passes), parallel)
    first = next(states.present())
    perturbations = [_perturbation(one) for one in passes for _ in range(first.latent.shape[0])]
    keeps = plan_keeps(perturbations, model.config.num_layers, first.latent.device, first.latent.dtype)
    if runs_fused(first.latent.device):
        model.warm_up(templates.map(lambda t: t.trial()), keeps)

    def run(
        x: AV[Tensor], sigma: float | Tensor, enabled: AV[bool], on_block: Callable[[], None], lanes: Lanes
    ) -> list[AV[Tensor]]:
        inputs = templates.map(lambda t, x, on: t.at(x, sigma, on), x, enabled)
        velocity = model(inputs, keeps=keeps, on_block=on_block, lanes=lanes)
        chunks = velocity.map(lambda v: v.chunk(len(passes)))
        return [chunks.map(lambda parts, index=index: parts[index]) for index in range(len(passes))]

    return _evaluation(run, check, first.latent.device, graphed, parallel)


def split_evaluate(
    model: Transformer,
    states: AV[LatentState],
    passes: Sequence[GuidancePass],
    positive: AV[Tensor],
    negative: AV[Tensor] | None,
    check: Callable[[], None],
    *,
    graphed: bool = False,
    share_prefixes: bool = True,
    parallel: ParallelContext = SINGLE,
) -> Evaluate:
    """An evaluation of one pass at a time, block after block over all passes; arguments as above.

    A pass's flags are plain Python: what it skips is not computed, and what passes have in common is computed once.
    """
    prompts = _project(model, states, positive, negative)
    templates = _templates(model, states, prompts[0], 1, parallel)
    perturbations = [_perturbation(one) for one in passes]
    first = next(states.present()).latent
    if runs_fused(first.device):
        trial = templates.map(lambda t: t.trial())
        for skips in perturbations:
            model.warm_up(trial, plan_keeps([skips], model.config.num_layers, first.device, first.dtype))

    def run(
        x: AV[Tensor], sigma: float | Tensor, enabled: AV[bool], on_block: Callable[[], None], lanes: Lanes
    ) -> list[AV[Tensor]]:
        # passes of one prompt get one input object, those of the other one that differs in the prompt alone: by that the
        # model knows how far they are alike
        alike = templates.map(lambda t, x, on: t.at(x, sigma, on), x, enabled)
        inputs = [alike.map(lambda one, context: replace(one, context=context), prompt) for prompt in prompts]
        chosen = [Pass(inputs[one.negative], skips) for one, skips in zip(passes, perturbations, strict=True)]
        return model.run_passes(chosen, share_prefixes=share_prefixes, on_block=on_block, lanes=lanes)

    return _evaluation(run, check, first.device, graphed, parallel)


def grouped_evaluate(
    model: Transformer,
    states: AV[LatentState],
    passes: Sequence[GuidancePass],
    positive: AV[Tensor],
    negative: AV[Tensor] | None,
    check: Callable[[], None],
    *,
    graphed: bool = False,
    parallel: ParallelContext = SINGLE,
    groups: PassGroups = ONE_GROUP,
) -> Evaluate:
    """``split_evaluate`` of this group's passes, and the predictions of all of them on every rank.

    parallel: the ranks of this group. The bits are those of one group of as many ranks.
    """
    own = groups.of(passes)
    run = (
        split_evaluate(model, states, own, positive, negative, check, graphed=graphed, parallel=parallel)
        if own
        else None
    )

    def evaluate(x: AV[Tensor], sigma: float, enabled: AV[bool]) -> Sequence[AV[Tensor]]:
        return groups.gather([] if run is None else run(x, sigma, enabled), len(passes), x)

    return evaluate


EVALUATIONS = {"split": grouped_evaluate, "batched": batched_evaluate}


def _evaluation(
    run: Run, check: Callable[[], None], device: torch.device, graphed: bool, parallel: ParallelContext
) -> Evaluate:
    if graphed:
        return Graphs(run, check, device, parallel)
    return lambda x, sigma, on: run(x, sigma, on, check, ONE_LANE)


def _perturbation(one: GuidancePass) -> Perturbation:
    return Perturbation(
        one.skip_video_self_attn_blocks,
        one.skip_audio_self_attn_blocks,
        one.disable_a2v_cross_attn,
        one.disable_v2a_cross_attn,
    )


def _project(
    model: Transformer, states: AV[LatentState], positive: AV[Tensor], negative: AV[Tensor] | None
) -> tuple[AV[Tensor], AV[Tensor]]:
    """The contexts of both prompts for every sample; each prompt is projected once."""
    prompts = [model.project_contexts(features) for features in (positive, negative or positive)]
    first, second = (
        states.map(lambda state, context: context.expand(state.latent.shape[0], -1, -1), prompt) for prompt in prompts
    )
    return first, second


def _templates(
    model: Transformer, states: AV[LatentState], contexts: AV[Tensor], copies: int, parallel: ParallelContext
) -> AV[_Template]:
    tables = model.rotary_tables(states.map(lambda state: state.positions))
    inputs = states.map(lambda state, context, tables: _input(state, context, tables, copies), contexts, tables)
    return shard(inputs, parallel).map(lambda one: _Template(one, copies))


def _input(state: LatentState, context: Tensor, tables: tuple[Rotary, CrossRotary], copies: int) -> StreamInput:
    """A stream's input at noise level 1."""
    batch = state.latent.shape[0] * copies
    # only a few mask values are distinct; finding them waits for the device, so it happens here and not in a step
    levels, index = state.mask[..., 0].unique(return_inverse=True)
    # a stream that is held fixed is at level 0 for the modules that see one level a stream
    own = levels.new_full((batch,), 0.0 if state.frozen else 1.0)
    bias = attention_bias(state, state.latent.dtype)
    return StreamInput(
        latent=state.latent,
        timesteps=Timesteps(levels.expand(batch, -1), None if len(levels) == 1 else index.repeat(copies, 1), own),
        context=context,
        rotary=tables[0],
        cross_rotary=tables[1],
        attention_bias=None if bias is None else bias.repeat(copies, 1, 1, 1),
        keyframes_mask=state.keyframes_mask,
    )


@dataclass(frozen=True)
class _Template:
    """A stream's input at noise level 1 with everything but the tokens filled in, for so many copies of these."""

    input: StreamInput
    copies: int

    def trial(self) -> StreamInput:
        """Tokens of no meaning at some level, to try kernels on."""
        return self._with(some_values(self.input.latent), 0.5, True)

    def at(self, x: Tensor, sigma: float | Tensor, enabled: bool) -> StreamInput:
        """The input for all tokens x [B, T, C], or, split over ranks, for this one's share of them."""
        return self._with(self.input.split.take(x, 1), sigma, enabled)

    def _with(self, x: Tensor, sigma: float | Tensor, enabled: bool) -> StreamInput:
        times = self.input.timesteps
        times = Timesteps(times.rows * sigma, times.index, times.sigma * sigma)
        tokens = x if self.copies == 1 else x.repeat(self.copies, 1, 1)
        return replace(self.input, latent=tokens, timesteps=times, enabled=enabled)
