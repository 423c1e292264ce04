"""Video tokens shared out to ranks; sound and text stay whole on each.

A few hundred tokens of sound cost less to compute on every rank than to exchange.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..av import AV
from ..transformer.inputs import StreamInput
from ..transformer.rope import CrossRotary, Rotary
from .context import ParallelContext, Split


def shard(inputs: AV[StreamInput], context: ParallelContext) -> AV[StreamInput]:
    """This rank's part of inputs that all ranks have; what is sharded already stays as it is.

    Raises ValueError where the ranks cannot share the heads, and for inputs that are sharded in another way.
    """
    if context.size == 1 or inputs.video is None:
        return inputs
    return AV(_share(inputs.video, context), inputs.audio)


def _share(whole: StreamInput, context: ParallelContext) -> StreamInput:
    if whole.split.context == context:
        return whole
    if whole.split.size > 1:
        raise ValueError(f"these tokens are split over {whole.split.size} ranks; they cannot be split again")
    _check_heads(whole.rotary.cos.shape[1], context.size)
    split = Split(context, whole.latent.shape[1])
    times, tables = whole.timesteps, whole.cross_rotary
    return replace(
        whole,
        latent=split.take(whole.latent, 1),
        timesteps=replace(times, index=_taken(times.index, 1, split)),
        rotary=_share_of_table(whole.rotary, split),
        cross_rotary=CrossRotary(_share_of_table(tables.local, split), tables.full),
        context_bias=_share_of_bias(whole.context_bias, split),
        keyframes_mask=_taken(whole.keyframes_mask, 1, split),
        split=split,
    )


def _taken(x: Tensor | None, dim: int, split: Split) -> Tensor | None:
    return None if x is None else split.take(x, dim)


def _share_of_table(table: Rotary, split: Split) -> Rotary:
    return Rotary(split.take(table.cos, 2), split.take(table.sin, 2))


def _share_of_bias(bias: Tensor | None, split: Split) -> Tensor | None:
    """Of a bias [..., T or 1, S] on text: one row may serve all tokens."""
    return bias if bias is None or bias.shape[-2] == 1 else split.take(bias, bias.dim() - 2)


def _check_heads(heads: int, ranks: int) -> None:
    if heads % ranks:
        *most, last = [str(count) for count in range(1, heads + 1) if heads % count == 0]
        raise ValueError(f"{ranks} ranks cannot share {heads} attention heads. Use {', '.join(most)} or {last}.")
