"""One transformer block: two halves of the same shape, and the exchange between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import gate_residual, rms_modulate
from ..av import AV
from ..config.transformer import StreamConfig, TransformerConfig
from .adaln import Modulation
from .attention import Attention, Keep
from .inputs import BlockKeep, StreamInput

# Rows of scale_shift_table and of the matching adaLN rows: shift, scale, gate of each branch.
SELF_ROWS, FF_ROWS, TEXT_ROWS = (0, 1, 2), (3, 4, 5), (6, 7, 8)
# Rows of the audio-video tables: scale before shift here. Rows 0, 1 serve audio-to-video, 2, 3 video-to-audio.
A2V_ROWS, V2A_ROWS, CROSS_GATE_ROW = (0, 1), (2, 3), 4


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


class FeedForward(nn.Module):
    """Linear to 4 times the width, tanh-approximated GELU, linear back."""

    def __init__(self, dim: int, *, bias: bool):
        super().__init__()
        self.net = nn.ModuleList([_Projection(dim, 4 * dim, bias), nn.Identity(), nn.Linear(4 * dim, dim, bias=bias)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0](x), approximate="tanh"))


class _Projection(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, bias: bool):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class StreamBlock(nn.Module):
    """One modality's half of a block.

    ``cross_attn`` is the attention that writes into this stream; ``cross_rows`` are the rows of its direction, in
    this stream's table for the queries and in the other stream's table for the keys and values.
    """

    def __init__(self, config: TransformerConfig, own: StreamConfig, other: StreamConfig, cross_rows: tuple[int, int]):
        super().__init__()
        self.eps = config.norm_eps
        self.cross_rows = cross_rows
        gated = config.gated_attention
        cross_heads, cross_head_dim = config.streams.audio.heads, config.streams.audio.head_dim
        self.attn1 = Attention(own.dim, own.dim, own.heads, own.head_dim, gated=gated, eps=self.eps)
        self.attn2 = Attention(own.dim, own.context_dim, own.heads, own.head_dim, gated=gated, eps=self.eps)
        self.cross_attn = Attention(own.dim, other.dim, cross_heads, cross_head_dim, gated=gated, eps=self.eps)
        self.ff = FeedForward(own.dim, bias=own.ff_bias)
        num_rows = 9 if config.cross_attention_adaln else 6
        self.scale_shift_table = nn.Parameter(torch.empty(num_rows, own.dim))
        self.prompt_scale_shift_table = (
            nn.Parameter(torch.empty(2, own.context_dim)) if config.cross_attention_adaln else None
        )
        self.cross_scale_shift_table = nn.Parameter(torch.empty(5, own.dim))

    def attend_self_and_text(self, x: Tensor, state: StreamState, modulation: Modulation, keep: Keep) -> Tensor:
        inputs = state.inputs
        shift, scale, gate = (modulation.row(j) for j in SELF_ROWS)
        h = rms_modulate(x, scale, shift, self.eps)
        x = gate_residual(x, self.attn1(h, rotary=inputs.rotary, bias=inputs.attention_bias, keep=keep), gate)
        if self.prompt_scale_shift_table is None:
            h = F.rms_norm(x, x.shape[-1:], eps=self.eps)
            return x + self.attn2(h, inputs.context, bias=inputs.context_bias)
        shift, scale, gate = (modulation.row(j) for j in TEXT_ROWS)
        h = rms_modulate(x, scale, shift, self.eps)
        return gate_residual(x, self.attn2(h, self._modulated_text(state), bias=inputs.context_bias), gate)

    def _modulated_text(self, state: StreamState) -> Tensor:
        table = self.prompt_scale_shift_table
        assert table is not None
        rows = table.to(state.inputs.context.dtype)
        if state.prompt is not None:
            rows = rows + state.prompt  # [B, 1, 2, C]
        shift, scale = rows[..., 0, :], rows[..., 1, :]
        return state.inputs.context * (1 + scale) + shift

    def modulate_for_cross(self, x: Tensor, state: StreamState, rows: tuple[int, int]) -> Tensor:
        """Normalise and modulate this stream's tokens for one direction of audio-video attention."""
        assert state.cross is not None
        scale_row, shift_row = rows
        # only the 4 scale and shift rows belong to the per-token module; the gate row has a module of its own
        modulation = state.cross.plus(self.cross_scale_shift_table[:CROSS_GATE_ROW])
        return rms_modulate(x, modulation.row(scale_row), modulation.row(shift_row), self.eps)

    def attend_cross(self, query: Tensor, context: Tensor, own: StreamState, other: StreamState, keep: Keep) -> Tensor:
        """The gated result that is added to this stream."""
        assert own.cross_gate is not None
        out = self.cross_attn(query, context, rotary=own.inputs.cross_rotary, context_rotary=other.inputs.cross_rotary)
        table = self.cross_scale_shift_table[CROSS_GATE_ROW].to(out.dtype)
        out = out * (table + own.cross_gate[:, :, 0])
        return out * keep if isinstance(keep, Tensor) else out

    def feed_forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        shift, scale, gate = (modulation.row(j) for j in FF_ROWS)
        return gate_residual(x, self.ff(rms_modulate(x, scale, shift, self.eps)), gate)


class AVBlock(nn.Module):
    """Self and text attention of each stream, attention between the streams, feed-forward of each (ltx-core 1.2)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        video, audio = config.streams.video, config.streams.audio
        self.video = StreamBlock(config, video, audio, A2V_ROWS)
        self.audio = StreamBlock(config, audio, video, V2A_ROWS)

    def forward(self, x: AV[Tensor], state: AV[StreamState], keep: BlockKeep) -> AV[Tensor]:
        """x: tokens of each stream, [B, T, C]. An absent stream is skipped together with both cross attentions."""
        halves = AV(self.video, self.audio)
        active = state.map(lambda s: s.inputs.enabled)
        modulation = state.map(lambda s, half: s.modulation.plus(half.scale_shift_table), halves)

        x = x.map(
            lambda x, on, half, s, m, k: half.attend_self_and_text(x, s, m, k) if on else x,
            active,
            halves,
            state,
            modulation,
            keep.self_attn,
        )
        # both directions read the state before either writes: that is the reference's order
        x = x.map(
            lambda x, on, update: x + update if on and update is not None else x,
            active,
            self._exchange(x, state, active, keep.cross),
        )
        return x.map(
            lambda x, on, half, m: half.feed_forward(x, m) if on else x,
            active,
            halves,
            modulation,
        )

    def _exchange(self, x: AV[Tensor], state: AV[StreamState], active: AV[bool], keep: AV[Keep]) -> AV[Tensor | None]:
        """What each stream receives from the other; ``None`` where nothing is computed."""
        if x.video is None or x.audio is None:
            return AV()

        def receive(own: StreamBlock, x_own, s_own, other: StreamBlock, x_other, s_other, on, keep):
            if not on or keep is False:
                return None
            query = own.modulate_for_cross(x_own, s_own, own.cross_rows)
            context = other.modulate_for_cross(x_other, s_other, own.cross_rows)
            return own.attend_cross(query, context, s_own, s_other, keep)

        return AV(
            receive(self.video, x.video, state.video, self.audio, x.audio, state.audio, active.video, keep.video),
            receive(self.audio, x.audio, state.audio, self.video, x.video, state.video, active.audio, keep.audio),
        )
