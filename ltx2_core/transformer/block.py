"""One transformer block: two halves of the same shape, and the exchange between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ...kernels import Rows, gelu_linear, gelu_quantize, residual_norm_modulate
from ..av import AV
from ..config.transformer import StreamConfig, TransformerConfig
from .adaln import Modulation
from .attention import Attention, Keep
from .heads import KeysValues
from .inputs import BlockKeep, StreamInput
from .lanes import ONE_LANE, Lanes
from .projections import Tokens, apply, for_linear, reads_rows

# Rows of scale_shift_table and of the matching adaLN rows: shift, scale, gate of each branch.
SELF_ROWS, FF_ROWS, TEXT_ROWS = (0, 1, 2), (3, 4, 5), (6, 7, 8)
# Rows of the audio-video tables: scale before shift here. Rows 0, 1 serve audio-to-video, 2, 3 video-to-audio.
A2V_ROWS, V2A_ROWS, CROSS_GATE_ROW = (0, 1), (2, 3), 4


# scale and shift of normalised tokens
Way = tuple[Rows, Rows]
T = TypeVar("T")


@dataclass(frozen=True)
class StreamState:
    """What the blocks read of one stream besides its tokens; constant during an evaluation.

    modulation: rows of self attention, feed-forward and text attention. prompt: rows for the text tokens.
    cross: scale and shift rows of audio-video attention; cross_gate: its gate row [B, 1, 1, C].
    """

    inputs: StreamInput
    modulation: Modulation
    prompt: Tensor | None
    cross: Modulation | None
    cross_gate: Tensor | None


@dataclass(frozen=True)
class _Read:
    """A stream's tokens x behind text attention, and what is still to be done with them.

    query: modulated to receive from the other stream. given: keys and values for the other to read. hidden: modulated for
    the feed-forward.
    """

    x: Tensor
    query: Tokens | None = None
    given: KeysValues | None = None
    hidden: Tokens | None = None


# by the identity of the pair of states
Texts = dict[int, AV[KeysValues]]


class Once(Generic[T]):
    """What so many passes have in common: the first makes it, and behind the last it is let go."""

    def __init__(self, sharers: int) -> None:
        self._left = sharers
        self._made: list[T] = []

    def get(self, make: Callable[[], T]) -> T:
        if not self._made:
            self._made.append(make())
        self._left -= 1
        return self._made[0] if self._left else self._made.pop()


@dataclass(frozen=True)
class Common:
    """What passes through one block have in common in one stream, before audio-video attention; ``None`` where they differ.

    own: tokens behind self attention, and these modulated to read the prompt. text: what they read of it, still to be added.
    """

    own: Once[tuple[Tensor, Tokens]] | None = None
    text: Once[Tensor] | None = None


BOTH_ALONE = AV(Common(), Common())


class FeedForward(nn.Module):
    """Linear to 4 times the width, tanh-approximated GELU, linear back. fast: the GELU reads unrounded sums."""

    def __init__(self, dim: int, *, bias: bool):
        super().__init__()
        self.fast = False
        self.net = nn.ModuleList([_Projection(dim, 4 * dim, bias), nn.Identity(), nn.Linear(4 * dim, dim, bias=bias)])

    @property
    def reads_rows(self) -> bool:
        """Whether it is computed from tokens in eight bits."""
        return reads_rows(self.net[0].proj)

    def forward(self, x: Tokens) -> Tensor:
        return apply(self.net[2], self._hidden(x))

    def _hidden(self, x: Tokens) -> Tokens:
        linear = self.net[0].proj
        if self.fast and type(linear) is nn.Linear:
            return for_linear(gelu_linear(x.plain, linear.weight, linear.bias, fast=True), self.net[2])
        hidden = apply(linear, x)
        if reads_rows(self.net[2]):
            return Tokens(hidden, gelu_quantize(hidden))
        # in place: the hidden layer is the largest tensor of a block
        return Tokens(torch.ops.aten.gelu_(hidden, approximate="tanh"))


class _Projection(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, bias: bool):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out, bias=bias)


class StreamBlock(nn.Module):
    """One modality's half of a block.

    ``cross_attn`` is the attention that writes into this stream; ``cross_rows`` are the rows of its direction, in
    this stream's table for the queries and in the other stream's table for the keys and values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        own: StreamConfig,
        other: StreamConfig,
        cross_rows: tuple[int, int],
    ):
        super().__init__()
        self.eps, self.fast = config.norm_eps, False
        self.cross_rows = cross_rows
        attention = partial(Attention, gated=config.gated_attention, eps=self.eps)
        cross_heads, cross_head_dim = config.streams.audio.heads, config.streams.audio.head_dim
        self.attn1 = attention(own.dim, own.dim, own.heads, own.head_dim)
        self.attn2 = attention(own.dim, own.context_dim, own.heads, own.head_dim)
        self.cross_attn = attention(own.dim, other.dim, cross_heads, cross_head_dim)
        self.ff = FeedForward(own.dim, bias=own.ff_bias)
        num_rows = 9 if config.cross_attention_adaln else 6
        self.scale_shift_table = nn.Parameter(torch.empty(num_rows, own.dim))
        self.prompt_scale_shift_table = (
            nn.Parameter(torch.empty(2, own.context_dim)) if config.cross_attention_adaln else None
        )
        self.cross_scale_shift_table = nn.Parameter(torch.empty(5, own.dim))

    def modulation(self, state: StreamState) -> Modulation:
        """The rows of self attention, feed-forward and text attention."""
        return state.modulation.plus(self.scale_shift_table)

    def cross_modulation(self, state: StreamState) -> Modulation:
        """The rows of both directions of audio-video attention."""
        assert state.cross is not None
        # only the 4 scale and shift rows belong to the per-token module; the gate row has a module of its own
        return state.cross.plus(self.cross_scale_shift_table[:CROSS_GATE_ROW])

    def cross_gate(self, state: StreamState) -> Rows:
        """The gate of what this stream receives from the other."""
        assert state.cross_gate is not None
        return Rows(state.cross_gate[:, :, 0] + self.cross_scale_shift_table[CROSS_GATE_ROW].to(state.cross_gate.dtype))

    def text(self, state: StreamState) -> KeysValues:
        """What the stream's tokens read of the prompt. It depends on the prompt and, from 2.3 on, on the noise level."""
        context, table = state.inputs.context, self.prompt_scale_shift_table
        if table is None:
            return self.attn2.keys_values(for_linear(context, self.attn2.to_k))
        rows = table.to(context.dtype)[None, None]  # [B, 1, 2, C]
        if state.prompt is not None:
            rows = rows + state.prompt
        shift, scale = map(Rows, rows.unbind(2))
        quantize = reads_rows(self.attn2.to_k)
        _, (output,) = residual_norm_modulate(context, ((scale, shift),), None, fast=self.fast, quantize=quantize)
        return self.attn2.keys_values(Tokens(*output) if quantize else Tokens(output))

    def attend_self_and_text(
        self,
        x: Tensor,
        state: StreamState,
        modulation: Modulation,
        text: KeysValues,
        keep: Keep,
        ways: Sequence[Way],
        quantize: bool,
        common: Common,
    ) -> tuple[Tensor, tuple[Tokens, ...]]:
        """Self and text attention of tokens x [B, T, C]; also the result normalised and modulated in these ways."""
        # tokens and branches by turns, in one name: each goes when the next is there
        h: Any
        x, h = _once(common.own, partial(self._attend_self, x, state, modulation, keep))
        h = _once(common.text, partial(self.attn2.attend_to, text, h, bias=state.inputs.context_bias))
        gate = modulation.row(TEXT_ROWS[2]) if self.prompt_scale_shift_table is not None else None
        return self.add(x, h, gate, ways=ways, quantize=quantize)

    def _attend_self(self, x: Tensor, state: StreamState, modulation: Modulation, keep: Keep) -> tuple[Tensor, Tokens]:
        """Tokens behind self attention, and these modulated to read the prompt."""
        inputs = state.inputs
        h: Any
        _, (h,) = self.add(x, ways=[_way(modulation, SELF_ROWS)], quantize=self.attn1.reads_rows)
        h = self.attn1.attend_self(h, inputs.rotary, bias=inputs.attention_bias, keep=keep, split=inputs.split)
        into_text = _way(modulation, TEXT_ROWS) if self.prompt_scale_shift_table is not None else None
        x, (h,) = self.add(x, h, modulation.row(SELF_ROWS[2]), ways=[into_text], quantize=self.attn2.reads_rows)
        return x, h

    def receive(
        self, x: Tensor, query: Tokens, given: KeysValues, own: StreamState, keep: Keep, way: Way
    ) -> tuple[Tensor, Tokens]:
        """Tokens with what they receive from the other stream, and these modulated in one way.

        query: tokens of this stream, modulated for this direction. given: what the other stream gives.
        """
        h: Any = self.cross_attn.attend_to(given, query, own.inputs.cross_rotary.local)
        mask = keep if isinstance(keep, Tensor) else None
        x, (h,) = self.add(x, h, self.cross_gate(own), mask, ways=[way], quantize=self.ff.reads_rows)
        return x, h

    def add(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        gate: Rows | None = None,
        keep: Tensor | None = None,
        ways: Sequence[Way | None] = (),
        quantize: bool = False,
    ) -> tuple[Tensor, tuple[Tokens, ...]]:
        """Tokens with a branch, gated; also the sum normalised and modulated in up to two ways, in eight bits too."""
        x, outputs = residual_norm_modulate(
            x, tuple(ways), self.eps, branch=branch, gate=gate, keep=keep, fast=self.fast, quantize=quantize
        )
        return x, tuple(Tokens(*output) if quantize else Tokens(output) for output in outputs)


def _once(shared: Once[T] | None, make: Callable[[], T]) -> T:
    return make() if shared is None else shared.get(make)


def _way(modulation: Modulation, rows: tuple[int, int, int]) -> Way:
    shift, scale, _ = rows
    return modulation.row(scale), modulation.row(shift)


class AVBlock(nn.Module):
    """Self and text attention of each stream, attention between the streams, feed-forward of each (ltx-core 1.2)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        video, audio = config.streams.video, config.streams.audio
        self.video = StreamBlock(config, video, audio, A2V_ROWS)
        self.audio = StreamBlock(config, audio, video, V2A_ROWS)

    @property
    def halves(self) -> AV[StreamBlock]:
        return AV(self.video, self.audio)

    def forward(
        self,
        x: AV[Tensor],
        state: AV[StreamState],
        keep: BlockKeep,
        texts: Texts | None = None,
        lanes: Lanes = ONE_LANE,
        common: AV[Common] = BOTH_ALONE,
    ) -> AV[Tensor]:
        """x: tokens of each stream, [B, T, C]. An absent stream is skipped together with both cross attentions.

        texts: what this block has read of prompts, for states that come again; it is added to. lanes: where the streams
        compute. common: shared by calls that begin alike.
        """
        halves, texts = self.halves, {} if texts is None else texts
        if id(state) not in texts:
            # nothing for a stream that stays as it is
            texts[id(state)] = lanes.map(lambda s, half: half.text(s) if s.inputs.enabled else None, state, halves)
        text = texts[id(state)]
        modulation = lanes.map(lambda s, half: half.modulation(s), state, halves)
        active = state.map(lambda s: s.inputs.enabled)
        both = len(list(x.present())) == 2
        receives = active.map(lambda on, keep: both and on and keep is not False, keep.cross)

        # both directions read the state before either writes: that is the reference's order
        read = lanes.map(
            self._attend_self_and_text,
            x,
            halves,
            halves.swap(),
            state,
            modulation,
            text,
            keep.self_attn,
            receives,
            receives.swap(),
            common,
        )
        lanes.meet()
        received = lanes.map(self._receive, read, read.swap(), halves, state, modulation, keep.cross)
        lanes.meet()
        # what either gave is read
        read = received
        del received
        return lanes.map(
            lambda one, half, m: (
                one.x if one.hidden is None else half.add(one.x, half.ff(one.hidden), m.row(FF_ROWS[2]))[0]
            ),
            read,
            halves,
            modulation,
        )

    @staticmethod
    def _attend_self_and_text(
        x: Tensor,
        half: StreamBlock,
        other: StreamBlock,
        state: StreamState,
        modulation: Modulation,
        text: KeysValues | None,
        keep: Keep,
        receives: bool,
        gives: bool,
        common: Common,
    ) -> _Read:
        ways = {}
        cross = half.cross_modulation(state) if receives or gives else None
        if receives:
            ways["query"] = cross.row(half.cross_rows[0]), cross.row(half.cross_rows[1])
        if gives:
            ways["given"] = cross.row(other.cross_rows[0]), cross.row(other.cross_rows[1])
        # a layer that is handed no rows makes its own, which is right and costs a pass
        quantize = half.ff.reads_rows
        if text is None:
            x, modulated = half.add(x, ways=list(ways.values()), quantize=quantize) if ways else (x, ())
        else:
            if not receives:
                ways["hidden"] = _way(modulation, FF_ROWS)
            x, modulated = half.attend_self_and_text(
                x, state, modulation, text, keep, list(ways.values()), quantize, common
            )
        read: dict[str, Any] = dict(zip(ways, modulated, strict=True))
        del modulated
        if gives:
            inputs = state.inputs
            read["given"] = other.cross_attn.keys_values_across(read["given"], inputs.cross_rotary, inputs.split)
        return _Read(x, **read)

    @staticmethod
    def _receive(
        own: _Read,
        other: _Read | None,
        half: StreamBlock,
        state: StreamState,
        modulation: Modulation,
        keep: Keep,
    ) -> _Read:
        if own.query is None:
            return own
        assert other is not None
        assert other.given is not None
        x, hidden = half.receive(own.x, own.query, other.given, state, keep, _way(modulation, FF_ROWS))
        return _Read(x, hidden=hidden)
