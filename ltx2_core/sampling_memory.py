"""How much device memory sampling takes beside the weights, as a pure function of sizes.

Counted tensor by tensor from `transformer/`, `evaluate.py` and `sampling/`: what lives while the largest operation of a
block runs. The unit is a *width*: the hidden states of one stream, samples x tokens x dim elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .av import AV
from .config.transformer import StreamConfig, TransformerConfig

# Feed-forward, at its GELU: the tokens modulated, 4 widths of the hidden layer, 4 of the result.
_GELU = 1 + 4 + 4
# Feed-forward, at its last linear: the tokens modulated, 4 widths of the hidden layer, the result.
_LAST_LINEAR = 1 + 4 + 1
# Self attention: the tokens modulated, queries, keys, values, the result.
_SELF_ATTENTION = 1 + 3 + 1
# Text attention, when the keys are normed: the tokens behind self attention, those modulated, the queries; and of the
# text the values, the keys, the normed keys, and the modulated text where it is modulated.
_TEXT_QUERIES, _TEXT_KEYS = 3, 3
# Shift, scale and gate, gathered for every token where tokens differ in noise level.
_GATHERED = 3
# Rows of a noise level beside those of the branches: audio-video attention, the embedded timestep.
_OTHER_ROWS = 4 + 1
# Latent tokens outside the model: what sampling started from, kept content, noisy state, guided and blended estimate.
_TOKEN_COPIES = 5
# float64 copies of them at the midpoint of a step: the state at its start, the estimate there, the midpoint.
_FLOAT64_COPIES = {"res_2s": 3}
# Widths that the allocator holds without use: memory of hidden layers that smaller tensors have cut up.
_FRAGMENTED = 5

_ONE_LEVEL, _UNBIASED = AV(1, 1), AV(False, False)


@dataclass(frozen=True, slots=True)
class WorkBytes:
    """The most that tensors take during some work, and the most that PyTorch takes from the device for them."""

    allocated: int
    reserved: int


@dataclass(frozen=True, slots=True)
class _Stream:
    """Bytes of one stream. kept: from the first step to the last. width: the hidden states.

    attention, feed_forward: what a branch holds at most beside the hidden states that enter the block and those that
    the other branches left behind.
    """

    kept: int
    width: int
    attention: int
    feed_forward: int


def sampling_work_bytes(
    config: TransformerConfig,
    tokens: AV[int],
    text_tokens: int,
    *,
    batch: int,
    passes: int,
    mode: str,
    dtype: torch.dtype,
    levels: AV[int] = _ONE_LEVEL,
    biased: AV[bool] = _UNBIASED,
    sampler: str = "euler",
    unpack_bytes: int = 0,
) -> WorkBytes:
    """The most that sampling takes beside the weights.

    tokens: of one sample in each stream, those of conditions included; ``None`` where there is no such stream.
    batch: samples. passes: of a step. mode: ``split`` or ``batched``. dtype: of activations.
    levels: distinct values of each stream's mask. biased: which streams' self attention has weights.
    unpack_bytes: the most that unpacking one packed weight holds.

    Without the workspaces of a GPU's libraries. Split passes count as if they differed from the first block on.
    Raises ValueError for an unknown mode.
    """
    if mode not in ("split", "batched"):
        raise ValueError(f"evaluation mode {mode!r} is not known; choose split or batched")
    split = mode == "split"
    samples = batch if split else batch * passes
    # split passes have inputs of their own for either prompt, also where all of them read the same
    inputs, prompts = (2, min(passes, 2)) if split else (1, 1)
    size = dtype.itemsize

    def stream(count: int, own: StreamConfig, levels: int, biased: bool) -> _Stream:
        width = samples * count * own.dim * size
        text = samples * text_tokens * own.context_dim * size
        rows = samples * levels * own.dim * size
        branch_rows = 9 if config.cross_attention_adaln else 6
        bias = samples * count**2 * size if biased else 0
        gathered = _GATHERED * width if levels > 1 else 0
        copies = (_TOKEN_COPIES + samples // batch - 1) * size + 8 * _FLOAT64_COPIES.get(sampler, 0)
        # features of either prompt, and what the model makes of them
        features = min(passes, 2) * text_tokens * (config.caption_channels or own.context_dim) * size
        projected = 2 * text_tokens * own.context_dim * size if config.caption_channels is not None else 0
        return _Stream(
            kept=inputs * (count * (own.dim + config.cross_dim) * size + bias)  # rotary tables, weights of attention
            + (batch * count**2 * size if biased else 0)
            + features
            + (projected if split else text)
            + batch * count * own.in_channels * copies
            + rows * (prompts * (branch_rows + _OTHER_ROWS) + branch_rows),
            width=width,
            attention=gathered
            + max(
                # a GPU copies weights whose rows are not aligned; behind it the result lies once more, as tokens
                _SELF_ATTENTION * width + max(width, bias if count % 8 else 0),
                _TEXT_QUERIES * width + (_TEXT_KEYS + config.cross_attention_adaln) * text,
            ),
            feed_forward=gathered + max(_GELU * width, _LAST_LINEAR * width + unpack_bytes),
        )

    streams = list(tokens.map(stream, config.streams, levels, biased).present())
    state = sum(one.width for one in streams)
    # every pass keeps the state that entered a block until the last pass is through it
    waiting = (2 * (passes if split else 1) - 1) * state
    work = done = 0
    for one in streams:
        work = max(work, done + one.attention, state + done + one.feed_forward)
        done += one.width
    allocated = sum(one.kept for one in streams) + waiting + work
    return WorkBytes(allocated, allocated + _FRAGMENTED * max(one.width for one in streams))
