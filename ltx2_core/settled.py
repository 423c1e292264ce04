"""Predictions that are the same on all ranks to the bit, whatever each of them has computed by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .av import AV
from .parallel.collectives import broadcast
from .sampling.denoise import Evaluate


def settled(evaluate: Evaluate) -> Evaluate:
    """``evaluate`` with the predictions of rank 0 on every rank: of sound, and of a picture that is not shared."""

    def of_rank_0(x: AV[Tensor], sigma: float, enabled: AV[bool]) -> Sequence[AV[Tensor]]:
        velocities = evaluate(x, sigma, enabled)

        def together(_: Tensor, *passes: Tensor) -> Tensor:
            stacked = torch.stack(passes)
            broadcast(stacked)
            return stacked

        parts = x.map(together, *velocities)
        return [parts.map(lambda passes, index=index: passes[index]) for index in range(len(velocities))]

    return of_rank_0
