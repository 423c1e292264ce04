"""Add a gated branch to the residual stream, normalise it, and modulate the result for up to two readers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .contract import CLOSE
from .dispatch import demand, demand_like, operation
from .precision import rounded_once
from .quantize import quantize_rows
from .rows import Rows

# a pair of scale and shift; None leaves the normalised tokens as they are
Modulated = tuple[Rows, Rows] | None

MOST_OUTPUTS = 2
WIDEST = 16384
_SAMPLE = 256


def _twin() -> Callable:
    from .residual_norm_modulate_triton import residual_norm_modulate

    return residual_norm_modulate


def _fit(
    x: Tensor,
    modulations: tuple[Modulated, ...],
    eps: float | None,
    *,
    branch: Tensor | None = None,
    gate: Rows | None = None,
    keep: Tensor | None = None,
    fast: bool = False,
    quantize: bool = False,
) -> Hashable:
    shape = x.shape
    demand(len(shape) == 3 and shape[2] <= WIDEST, "shape")
    demand(shape[0] > 0 and shape[1] > 0, "empty")
    demand(len(modulations) <= MOST_OUTPUTS, "more than two outputs")
    demand(branch is not None or len(modulations) > 0, "nothing to do")
    demand(branch is None or branch.shape == shape, "shape")
    demand_like(x, branch, keep)
    demand(keep is None or keep.shape == (shape[0], 1, 1), "shape of keep")
    indexed = [gate is not None and _is_indexed(gate, x, shape)]
    for modulation in modulations:
        if modulation is not None:
            scale, shift = modulation
            indexed.append(_is_indexed(scale, x, shape))
            demand(scale.index is shift.index, "scale and shift of different tokens")
            a, b = scale.values, shift.values
            demand(a.shape == b.shape and a.stride() == b.stride(), "scale and shift of different strides")
            demand(b.dtype == a.dtype and b.device == a.device, "mixed dtypes")
    plain = tuple(modulation is None for modulation in modulations)
    return shape[2], eps is None, branch is None, gate is None, keep is None, tuple(indexed), plain, fast, quantize


def _is_indexed(rows: Rows, x: Tensor, shape: Sequence[int]) -> bool:
    """Whether the vectors are found through an index. Raises Unfit if they are not vectors for x, which has that shape."""
    values, index = rows.values, rows.index
    batch, tokens, width = shape
    demand(values.dtype == x.dtype, "mixed dtypes")
    demand(values.device == x.device, "mixed devices")
    demand(values.stride(-1) == 1, "last axis not contiguous")
    vectors = values.shape
    demand(len(vectors) == 3 and vectors[0] in (1, batch) and vectors[2] == width, "shape of the modulation")
    if index is None:
        demand(vectors[1] == 1 or vectors[1] == tokens, "shape of the modulation")
        return False
    demand(index.shape == (batch, tokens) and index.device == x.device, "shape of the index")
    return True


def _sample(
    x: Tensor,
    modulations: tuple[Modulated, ...],
    eps: float | None,
    *,
    branch: Tensor | None = None,
    gate: Rows | None = None,
    **others: Any,
) -> tuple[tuple, dict]:
    few = tuple(m and (m[0].first(_SAMPLE), Rows(m[1].first(_SAMPLE).values, None)) for m in modulations)
    # both of a pair have one index
    few = tuple(m and (m[0], Rows(m[1].values, m[0].index)) for m in few)
    some = {"branch": None if branch is None else branch[:, :_SAMPLE], "gate": gate and gate.first(_SAMPLE)}
    return (x[:, :_SAMPLE], few, eps), {**some, **others}


@operation(twin=_twin, fit=_fit, sample=_sample, contract=CLOSE)
def residual_norm_modulate(
    x: Tensor,
    modulations: tuple[Modulated, ...],
    eps: float | None,
    *,
    branch: Tensor | None = None,
    gate: Rows | None = None,
    keep: Tensor | None = None,
    fast: bool = False,
    quantize: bool = False,
) -> tuple[Tensor, tuple[Any, ...]]:
    """Return ``x + branch * gate * keep`` and, for each modulation, ``rms_norm(that) * (1 + scale) + shift``.

    x, branch: [B, T, C]. gate: a vector for each token. keep: [B, 1, 1], a factor for each sample. modulations: pairs of
    scale and shift; None stands for the norm alone. eps: None for no norm, as of text. The first result is x itself without a
    branch. The outputs are in x's dtype; with ``quantize`` each is a pair of it and its ``Quantized`` rows.

    Every operation rounds to x's dtype in turn, from left to right, as ltx-core 1.2 does; ``fast`` computes in float32 and
    rounds each result once. Raises ValueError for a gate or keep without a branch.
    """
    if branch is None and (gate is not None or keep is not None):
        raise ValueError("a gate or keep needs a branch")
    compute = rounded_once(_chain) if fast else _chain
    added, outputs = compute(x, modulations, eps, branch, gate, keep)
    if quantize:
        outputs = tuple((output, quantize_rows.definition(output)) for output in outputs)
    return (x if branch is None else added), outputs


def _chain(
    x: Tensor,
    modulations: tuple[Modulated, ...],
    eps: float | None,
    branch: Tensor | None,
    gate: Rows | None,
    keep: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    tokens = x.shape[1]
    if branch is not None:
        if gate is not None:
            branch = branch * gate.spread(tokens)
        if keep is not None:
            branch = branch * keep
        x = x + branch
    if not modulations:
        return x, ()
    normed = x if eps is None else F.rms_norm(x, x.shape[-1:], eps=eps)

    def modulated(modulation: Modulated) -> Tensor:
        if modulation is None:
            return normed
        scale, shift = modulation
        return normed * (1 + scale.spread(tokens)) + shift.spread(tokens)

    return x, tuple(map(modulated, modulations))
