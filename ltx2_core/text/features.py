"""Feature extractors: all hidden states of the text encoder, normalised and projected, one vector a token.

Formulas and roundings: ltx-core 1.2, FeatureExtractorV1 (LTX-2.0) and FeatureExtractorV2 (2.3, 2.5). The flattened index
is ``d * L + l``: the layers of one channel lie together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..av import AV

_EPS = 1e-6


class FeatureExtractorV1(nn.Module):
    """One projection for both streams; every layer is scaled by its mean and range over the prompt."""

    def __init__(self, feature_dim: int, num_hidden_states: int):
        super().__init__()
        self.aggregate_embed = nn.Linear(feature_dim * num_hidden_states, feature_dim, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> AV[Tensor]:
        """states: [B, S, D, L]; mask: [B, S], True at tokens. Returns [B, S, D] twice, the same tensor."""
        normed = _range_norm(states, mask)
        features = self.aggregate_embed(normed.flatten(2).to(self.aggregate_embed.weight.dtype))
        return AV(features, features)


class FeatureExtractorV2(nn.Module):
    """A projection for each stream; every token of every layer is scaled by its own RMS."""

    def __init__(self, feature_dim: int, num_hidden_states: int, widths: AV[int]):
        super().__init__()
        self.feature_dim = feature_dim
        self.video_aggregate_embed = nn.Linear(feature_dim * num_hidden_states, widths.video)
        self.audio_aggregate_embed = nn.Linear(feature_dim * num_hidden_states, widths.audio)

    def forward(self, states: Tensor, mask: Tensor) -> AV[Tensor]:
        """states: [B, S, D, L]; mask: [B, S], True at tokens. Returns [B, S, video width] and [B, S, audio width]."""
        normed = _rms_norm(states, mask).flatten(2)
        return AV(self.video_aggregate_embed, self.audio_aggregate_embed).map(
            lambda linear: linear((normed * self._gain(linear)).to(linear.weight.dtype))
        )

    def _gain(self, linear: nn.Linear) -> float:
        return math.sqrt(linear.out_features / self.feature_dim)


def _range_norm(states: Tensor, mask: Tensor) -> Tensor:
    """8 * (x - mean) / (max - min), each over the tokens and channels of one layer; 0 at padding.

    Sum, extremes and range keep the states' dtype; the mean is float32, and with it the result.
    """
    valid = mask.bool()[:, :, None, None]
    count = mask.sum(dim=1).view(-1, 1, 1, 1) * states.shape[2]
    mean = states.masked_fill(~valid, 0).sum(dim=(1, 2), keepdim=True) / (count.float() + _EPS)
    high = states.masked_fill(~valid, -math.inf).amax(dim=(1, 2), keepdim=True)
    low = states.masked_fill(~valid, math.inf).amin(dim=(1, 2), keepdim=True)
    normed = 8 * (states - mean) / (high - low + _EPS)
    return normed.masked_fill(~valid, 0)


def _rms_norm(states: Tensor, mask: Tensor) -> Tensor:
    """x / rms over channels, per token and layer, in the states' dtype throughout; 0 at padding."""
    variance = states.square().mean(dim=2, keepdim=True)
    normed = states * torch.rsqrt(variance + _EPS)
    return normed.masked_fill(~mask.bool()[:, :, None, None], 0)
