"""Weights with the changes of several LoRAs, and the factors of branches beside a weight.

Numerics, "float32": products of factors are float32 products (``products``), the differences are added up in float32 in
the order of the list, their sum is added to the weight in float32 and rounded once. "ltx-core": what ltx-core 1.0.0
computes, bit for bit on a CPU; it knows plain pairs only, and no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .kinds import BIAS_ROLES, KINDS, add_decomposed
from .layer import LoraLayer

PARITIES = ("float32", "ltx-core")

# a layer of a file, its tensors by role in the dtypes in which they are stored, and the strength
Part = tuple[LoraLayer, Mapping[str, Tensor], float]


@torch.no_grad()
def add_deltas(
    weight: Tensor,
    parts: Sequence[Part],
    *,
    parity: str = "float32",
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """A parameter plus what each part changes in it, in ``dtype``, and in ``out`` or memory of its own; ``weight`` stays as
    it is.

    weight: a weight [out, in], a table, a norm's weight or a bias. parts: with the tensors that change this parameter
    (a value of ``LoraLayer.parameters``), on the same device. dtype: float32 for a caller that goes on computing; with
    the weight's own the last pass over memory rounds. out: of the weight's shape and ``dtype``. Never waits for the device. A DoRA replaces the magnitudes of the
    weight plus its own difference, whatever stands before it.
    Raises ValueError for an unknown parity and, with "ltx-core", for parts that ltx-core does not know.
    """
    if parity not in PARITIES:
        raise ValueError(f"parity {parity!r} is not known; choose {', '.join(PARITIES)}")
    if parity == "ltx-core":
        changed = _as_ltx_core(weight, parts)
        return changed.to(dtype) if out is None else out.copy_(changed)
    total: Tensor | None = None
    for layer, tensors, strength in parts:
        if not tensors.keys().isdisjoint(BIAS_ROLES):
            total = _add_bias(total, weight, tensors, strength)
        elif layer.decomposed:
            total = add_decomposed(total, weight, KINDS[layer.kind], tensors, layer.scale, strength)
        else:
            total = KINDS[layer.kind].add(total, weight, tensors, strength * layer.scale)
    if total is None:
        return weight.to(dtype, copy=True) if out is None else out.copy_(weight)
    if out is None:
        out = total if dtype == torch.float32 else torch.empty_like(total, dtype=dtype)
    # computed in float32, whatever it is rounded to
    return torch.add(total, weight, out=out)


def factors(layer: LoraLayer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """A [rank, in], B [out, rank] and alpha/rank of a branch beside the weight: x -> strength * alpha/rank * (x A^T) B^T.

    Raises ValueError for a layer that is no such branch (``LoraLayer.low_rank``).
    """
    if not layer.low_rank:
        raise ValueError(f"{layer.name} is a {layer.title}: it has no two factors")
    return tensors["A"], tensors["B"], layer.scale


def ltx_core_knows(layer: LoraLayer) -> bool:
    return layer.low_rank and not layer.bias


def _add_bias(total: Tensor | None, bias: Tensor, tensors: Mapping[str, Tensor], strength: float) -> Tensor:
    total = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if total is None else total
    for role in BIAS_ROLES:
        if role in tensors:
            total.add_(tensors[role], alpha=strength)
    return total


def _as_ltx_core(weight: Tensor, parts: Sequence[Part]) -> Tensor:
    """Factor B times strength and the product in the stored dtype, each product rounded to bfloat16; their sum rounds
    once, and once more with the weight."""
    total: Tensor | None = None
    for layer, tensors, strength in parts:
        if not ltx_core_knows(layer):
            raise ValueError(
                f"{layer.name} is a {layer.title}{' with a bias' if layer.bias else ''}: ltx-core has none"
            )
        change = ((tensors["B"] * strength) @ tensors["A"]).bfloat16().float()
        total = change if total is None else total.add_(change)
    base = weight.bfloat16()
    return base.clone() if total is None else total.bfloat16().add_(base)
