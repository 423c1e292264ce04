"""What surrounds the blocks in one stream: token projection, timestep and caption modules, output head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.transformer import StreamConfig, TransformerConfig
from .adaln import AdaLN, Modulation
from .block import StreamState
from .inputs import StreamInput


class CaptionProjection(nn.Module):
    """Text features to context tokens (2.0): linear, tanh-approximated GELU, linear."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


class Stream(nn.Module):
    """One modality outside the blocks.

    keyframe_marker: whether this stream marks single-pixel-frame tokens (the video stream of 2.5).
    """

    def __init__(self, config: TransformerConfig, own: StreamConfig, *, keyframe_marker: bool):
        super().__init__()
        self.config = config
        self.eps = config.norm_eps
        self.patchify_proj = nn.Linear(own.in_channels, own.dim)
        self.keyframes_abs_pos_embedding = nn.Parameter(torch.empty(1, own.dim)) if keyframe_marker else None
        self.caption_projection = (
            CaptionProjection(config.caption_channels, own.dim) if config.caption_channels is not None else None
        )
        self.adaln = AdaLN(own.dim, 9 if config.cross_attention_adaln else 6)
        self.prompt_adaln = AdaLN(own.dim, 2) if config.prompt_adaln else None
        self.cross_adaln = AdaLN(own.dim, 4)
        self.cross_gate_adaln = AdaLN(own.dim, 1)
        self.scale_shift_table = nn.Parameter(torch.empty(2, own.dim))
        self.proj_out = nn.Linear(own.dim, own.out_channels)

    def project_context(self, features: Tensor) -> Tensor:
        """Text features to this stream's context [B, S, C]; the identity from 2.3 on. Depends on the prompt only."""
        return features if self.caption_projection is None else self.caption_projection(features)

    def embed(self, inputs: StreamInput) -> Tensor:
        """Latent tokens [B, T, in_channels] to hidden tokens [B, T, C]."""
        x = self.patchify_proj(inputs.latent)
        if self.keyframes_abs_pos_embedding is None or inputs.keyframes_mask is None:
            return x
        marked = (inputs.keyframes_mask > 0).to(x.dtype)
        return x + marked * self.keyframes_abs_pos_embedding.to(x.dtype)

    def condition(self, inputs: StreamInput, other: StreamInput | None) -> tuple[StreamState, Tensor]:
        """The state that the blocks read, and the embedded timestep [B, U, C] for the output head.

        Audio-video scale and shift follow the stream's own timesteps, the gate the other stream's sigma (ltx-core 1.2).
        """
        times = inputs.timesteps
        scale = self.config.timestep_scale
        levels, sigma = times.rows * scale, times.sigma[:, None] * scale
        rows, embedded = self.adaln(levels)
        prompt = None if self.prompt_adaln is None else self.prompt_adaln(sigma)[0]
        cross = gate = None
        if other is not None:
            cross = Modulation(self.cross_adaln(levels)[0], times.index)
            other_sigma = other.timesteps.sigma[:, None] * scale
            gate = self.cross_gate_adaln(other_sigma * (self.config.cross_gate_timestep_scale / scale))[0]
        return StreamState(inputs, Modulation(rows, times.index), prompt, cross, gate), embedded

    def predict(self, x: Tensor, inputs: StreamInput, embedded: Tensor) -> Tensor:
        """Hidden tokens to the velocity [B, T, out_channels]."""
        # the embedding before the silu of adaLN; table + embedding is rounded before 1 + scale
        modulation = Modulation(embedded[:, :, None], inputs.timesteps.index).plus(self.scale_shift_table)
        shift, scale = (modulation.row(j).spread(x.shape[1]) for j in (0, 1))
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return self.proj_out(x * (1 + scale) + shift)
