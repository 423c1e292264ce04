"""How much device memory sampling takes beside the weights, as a pure function of sizes.

Counted tensor by tensor from `transformer/`, `evaluate.py` and `sampling/`: what lives while the largest operation of a
block runs. The unit is a *width*: the hidden states of one stream, samples x tokens x dim elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .av import AV
from .config.transformer import StreamConfig, TransformerConfig


@dataclass(frozen=True, slots=True)
class _Peaks:
    """Widths that live at the same time in the parts of a block, beside those of the state that entered it.

    self_attention: the tokens modulated, queries, keys and values in one, both once more behind norm and rotation, and the
    result. two_ways: behind text attention, when the state is modulated for two readers. received: the same for one reader,
    behind what comes from the other stream, without what is counted in ``_BETWEEN``.
    crossed: keys and values of audio-video attention. gathered: more where tokens differ in noise level.
    """

    self_attention: int
    two_ways: int
    received: int
    crossed: int
    gathered: int


# In plain torch every operation makes a tensor; it makes copies of queries and keys to rotate them.
_TORCH = _Peaks(self_attention=8, two_ways=8, received=6, crossed=5, gathered=1)
_FUSED = _Peaks(self_attention=7, two_ways=5, received=3, crossed=3, gathered=0)
# In self attention itself: the tokens modulated, queries, keys and values in one, queries and keys once more, the result.
_ATTENDING = 7
# Between text attention and what one stream receives from the other: the state and, modulated, its queries; as wide as
# audio-video attention: the keys as they were projected and normed, and the values.
_BETWEEN, _GIVEN = 2, 3
# While those keys and values are made: the state, and modulated twice.
_GIVING = 3
# Queries of audio-video attention, and the result.
_QUERIES = 2
# Before the feed-forward: the state, and modulated.
_BEFORE_FF = 2
# Feed-forward: 4 widths of the hidden layer, in which the GELU is computed in place, and the result.
_HIDDEN, _FF_RESULT = 4, 1
# Text attention: of every prompt the keys as they were projected and normed, and the values.
_TEXT = 3
# Rows of a noise level beside those of the branches: audio-video attention, the embedded timestep.
_OTHER_ROWS = 4 + 1
# Those that a block adds its table to for audio-video attention.
_CROSS_ROWS = 4
# Latent tokens outside the model: what sampling started from, kept content, noisy state, guided and blended estimate.
_TOKEN_COPIES = 5
# float64 copies of them at the midpoint of a step: the state at its start, the estimate there, the midpoint.
_FLOAT64_COPIES = {"res_2s": 3}
# Widths that the allocator holds without use: memory of hidden layers that smaller tensors have cut up.
_FRAGMENTED = 5

# Widths of a share that are sent and received beside queries, keys and values where ranks share the picture, and weights of
# attention between all of its tokens.
_EXCHANGED, _WHOLE_WEIGHTS = 5, 3

_ONE_LEVEL, _UNBIASED = AV(1, 1), AV(False, False)


@dataclass(frozen=True, slots=True)
class WorkBytes:
    """The most that tensors take during some work, and the most that PyTorch takes from the device for them."""

    allocated: int
    reserved: int


@dataclass(frozen=True, slots=True)
class _Stream:
    """Bytes of one stream.

    kept: from the first step to the last. width: the hidden states. rows: these in eight bits, where layers read those.
    text: what a block keeps of prompts.
    first: self and text attention. crossed: tokens as wide as audio-video attention. giving: while the other stream's keys
    and values are made. between: with these made. received: with what comes from the other stream.
    """

    kept: int
    width: int
    rows: int
    text: int
    first: int
    crossed: int
    giving: int
    between: int
    received: int


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
    fused: bool = False,
    eight_bit: bool = False,
    ulysses: int = 1,
) -> WorkBytes:
    """The most that sampling takes beside the weights.

    tokens: of one sample in each stream, those of conditions included; ``None`` where there is no such stream.
    batch: samples. passes: of a step. mode: ``split`` or ``batched``. dtype: of activations.
    levels: distinct values of each stream's mask. biased: which streams' self attention has weights.
    unpack_bytes: the most that unpacking one packed weight holds. fused: whether fused kernels run.
    eight_bit: whether blocks compute in eight bits. ulysses: ranks that share the video's tokens.

    Without the workspaces of a GPU's libraries. Split passes count as if they differed from the first block on.
    Raises ValueError for an unknown mode.
    """
    if mode not in ("split", "batched"):
        raise ValueError(f"evaluation mode {mode!r} is not known; choose split or batched")
    if ulysses > 1 and tokens.video:
        share = sampling_work_bytes(
            config,
            AV(-(-tokens.video // ulysses), tokens.audio),
            text_tokens,
            batch=batch,
            passes=passes,
            mode=mode,
            dtype=dtype,
            levels=levels,
            biased=biased,
            sampler=sampler,
            unpack_bytes=unpack_bytes,
            fused=fused,
            eight_bit=eight_bit,
        )
        samples = batch if mode == "split" else batch * passes
        buffers = _EXCHANGED * samples * -(-tokens.video // ulysses) * config.streams.video.dim * dtype.itemsize
        whole = _whole_on_every_rank(config, tokens.video, batch * passes, dtype) + buffers
        if biased.video:
            whole += _WHOLE_WEIGHTS * samples * tokens.video**2 * dtype.itemsize
        return WorkBytes(share.allocated + whole, share.reserved + whole)
    split = mode == "split"
    samples = batch if split else batch * passes
    prompts = min(passes, 2) if split else 1
    size, peaks = dtype.itemsize, _FUSED if fused else _TORCH

    def stream(count: int, own: StreamConfig, levels: int, biased: bool) -> _Stream:
        width = samples * count * own.dim * size
        eight = width // size if eight_bit else 0
        crossed = samples * count * config.cross_dim * size
        text = samples * text_tokens * own.context_dim * size
        rows = samples * levels * own.dim * size
        branch_rows = 9 if config.cross_attention_adaln else 6
        bias = samples * count**2 * size if biased else 0
        gathered = peaks.gathered * width if levels > 1 else 0
        copies = (_TOKEN_COPIES + samples // batch - 1) * size + 8 * _FLOAT64_COPIES.get(sampler, 0)
        # features of either prompt, and what the model makes of them
        features = min(passes, 2) * text_tokens * (config.caption_channels or own.context_dim) * size
        projected = 2 * text_tokens * own.context_dim * size if config.caption_channels is not None else 0
        return _Stream(
            kept=count * (own.dim + config.cross_dim) * size  # rotary tables
            + bias  # weights of attention, and below what they were made from
            + (batch * count**2 * size if biased else 0)
            + features
            + (projected if split else text)
            + batch * count * own.in_channels * copies
            + rows * (2 * branch_rows + _OTHER_ROWS),
            width=width,
            rows=eight,
            text=prompts * _TEXT * text,
            first=_CROSS_ROWS * rows
            + max(
                # a GPU copies weights whose rows are not aligned
                eight + max(peaks.self_attention * width, _ATTENDING * width + bias * (count % 8 != 0)),
                2 * eight + peaks.two_ways * width + gathered,
                config.cross_attention_adaln * text,
            ),
            crossed=crossed,
            giving=_CROSS_ROWS * rows + 2 * eight + _GIVING * width + peaks.crossed * crossed,
            between=eight + _BETWEEN * width + _GIVEN * crossed,
            received=eight + peaks.received * width + gathered,
        )

    streams = list(tokens.map(stream, config.streams, levels, biased).present())
    state = sum(one.width for one in streams)
    # every pass keeps the state that entered a block until the last pass is through it
    waiting = (2 * (passes if split else 1) - 1) * state
    rows = sum(one.rows for one in streams)
    exchange = len(streams) == 2
    between = sum(one.between for one in streams)
    work = 0
    for number, one in enumerate(streams):
        ahead = sum(before.width for before in streams[:number])
        work = max(
            work,
            sum(before.between for before in streams[:number]) + max(one.first, one.giving if exchange else 0),
            between + _BEFORE_FF * ahead + max(one.received, _QUERIES * one.crossed) if exchange else 0,
            _BEFORE_FF * state
            + rows
            + ahead
            + _HIDDEN * (one.width + one.rows)
            + _FF_RESULT * one.width
            + unpack_bytes,
        )
    allocated = sum(one.kept + one.text for one in streams) + waiting + work
    return WorkBytes(allocated, allocated + _FRAGMENTED * max(one.width for one in streams))


def _whole_on_every_rank(config: TransformerConfig, tokens: int, samples: int, dtype: torch.dtype) -> int:
    """The most of a shared picture that every rank has of all tokens: while tables are made, and what stays."""
    video = config.streams.video
    tables = tokens * (video.dim + 2 * config.cross_dim) * dtype.itemsize
    return tables + samples * tokens * video.in_channels * (_TOKEN_COPIES * dtype.itemsize + 3 * 8)
