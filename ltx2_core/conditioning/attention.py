"""How strongly the tokens of a stream see each other: weights in [0, 1], and the bias that attention adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .state import LatentState


def extended_mask(mask: Tensor | None, num_target: int, existing: int, weights: Tensor) -> Tensor:
    """Attention weights after appending tokens to a stream (ltx-core 1.2).

    mask: [B, N, N] of the N = ``existing`` tokens, ``None`` for all ones. weights: [B, M] of the new tokens.
    Target and new token see each other with the new one's weight, new tokens see each other fully, and tokens of
    different references do not see each other. Returns [B, N + M, N + M] in the dtype of ``weights``.
    """
    batch, count = weights.shape
    total = existing + count
    wider = weights.new_zeros(batch, total, total)
    wider[:, :existing, :existing] = 1.0 if mask is None else mask
    wider[:, existing:, existing:] = 1.0
    wider[:, :num_target, existing:] = weights[:, None]
    wider[:, existing:, :num_target] = weights[:, :, None]
    return wider


def attention_bias(state: LatentState, dtype: torch.dtype) -> Tensor | None:
    """What self attention adds to its scores: log(weight), [B, 1, T, T] in ``dtype``; ``None`` without weights.

    Weights of 0 become the dtype's lowest number, as in ltx-core 1.2: infinity would make rows of zeros NaN.
    """
    if state.attention_mask is None:
        return None
    weights = state.attention_mask.to(dtype)
    bias = weights.log().masked_fill_(weights <= 0, torch.finfo(dtype).min)
    return bias[:, None]


def token_weights(mask: Tensor, grid: tuple[int, int, int], strength: float) -> Tensor:
    """Weights of latent tokens from a pixel mask: averages over what each latent cell covers, times ``strength``.

    mask: [M, h, w] in 0..1. The first frame belongs to the first latent frame, the rest is shared out evenly; one
    frame holds for all. grid: latent frames, rows and columns. Returns [F * H * W] float32.
    Raises ValueError for a number of frames that cannot be shared out.
    """
    frames, rows, columns = grid
    areas = F.interpolate(mask.float()[None], size=(rows, columns), mode="area")[0]
    if areas.shape[0] == 1:
        areas = areas.expand(frames, -1, -1)
    elif frames == 1 or (areas.shape[0] - 1) % (frames - 1):
        raise ValueError(
            f"an attention mask of {areas.shape[0]} frames cannot be shared out over {frames} latent frames: use 1 frame "
            f"or {8 * (frames - 1) + 1}"
        )
    else:
        rest = areas[1:].unflatten(0, (frames - 1, -1)).mean(1)
        areas = torch.cat((areas[:1], rest))
    return areas.flatten() * strength
