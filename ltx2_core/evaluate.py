"""Evaluation of guidance passes by the transformer: what is constant for a run is built once, here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .av import AV
from .conditioning.state import LatentState
from .sampling.denoise import Evaluate
from .sampling.guidance import GuidancePass
from .transformer.inputs import Perturbation, StreamInput, Timesteps, plan_keeps
from .transformer.model import Transformer
from .transformer.rope import Rotary


def batched_evaluate(
    model: Transformer,
    states: AV[LatentState],
    passes: Sequence[GuidancePass],
    positive: AV[Tensor],
    negative: AV[Tensor] | None,
    on_block: Callable[[], None],
) -> Evaluate:
    """An evaluation of all passes in one model call, stacked on the batch dimension, pass-major.

    positive, negative: text features of the prompts, [1, S, width] on the model's device and in its dtype.
    ``on_block`` is called before every block and may raise to stop.

    Nothing in the returned function waits for the device: levels, masks and tables are built now.
    """
    contexts = _stack_contexts(model, states, passes, positive, negative)
    tables = model.rotary_tables(states.map(lambda state: state.positions))
    templates = states.map(
        lambda state, context, tables: _Template(state, context, tables, len(passes)), contexts, tables
    )
    first = next(states.present())
    perturbations = [_perturbation(one) for one in passes for _ in range(first.latent.shape[0])]
    keeps = plan_keeps(perturbations, model.config.num_layers, first.latent.device, first.latent.dtype)

    def evaluate(x: AV[Tensor], sigma: float) -> AV[Tensor]:
        return model(templates.map(lambda t, x: t.at(x, sigma), x), keeps=keeps, on_block=on_block)

    return evaluate


def _perturbation(one: GuidancePass) -> Perturbation:
    return Perturbation(
        one.skip_video_self_attn_blocks,
        one.skip_audio_self_attn_blocks,
        one.disable_a2v_cross_attn,
        one.disable_v2a_cross_attn,
    )


def _stack_contexts(
    model: Transformer,
    states: AV[LatentState],
    passes: Sequence[GuidancePass],
    positive: AV[Tensor],
    negative: AV[Tensor] | None,
) -> AV[Tensor]:
    """Each prompt is projected once and repeated for the passes and samples that use it."""
    positive = model.project_contexts(positive)
    negative = positive if negative is None else model.project_contexts(negative)

    def stack(state: LatentState, pos: Tensor, neg: Tensor) -> Tensor:
        batch = state.latent.shape[0]
        return torch.cat([(neg if one.negative else pos).expand(batch, -1, -1) for one in passes])

    return states.map(stack, positive, negative)


class _Template:
    """A stream's input with everything but the tokens and the noise level filled in."""

    def __init__(self, state: LatentState, context: Tensor, tables: tuple[Rotary, Rotary], copies: int):
        self.copies = copies
        batch = state.latent.shape[0] * copies
        # only a few mask values are distinct; finding them waits for the device, so it happens here and not in a step
        levels, index = state.mask[..., 0].unique(return_inverse=True)
        self.levels = levels.expand(batch, -1)
        self.ones = levels.new_ones(batch)
        self.input = StreamInput(
            latent=state.latent,
            timesteps=Timesteps(self.levels, None if len(levels) == 1 else index.repeat(copies, 1), self.ones),
            context=context,
            rotary=tables[0],
            cross_rotary=tables[1],
            keyframes_mask=state.keyframes_mask,
        )

    def at(self, x: Tensor, sigma: float) -> StreamInput:
        times = Timesteps(self.levels * sigma, self.input.timesteps.index, self.ones * sigma)
        return replace(self.input, latent=x.repeat(self.copies, 1, 1), timesteps=times)
