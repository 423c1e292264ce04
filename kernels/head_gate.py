"""Scale the output of every attention head."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .contract import CLOSE
from .dispatch import demand, demand_like, operation, power_of_two
from .precision import rounded_once
from .quantize import quantize_rows

WIDEST = 8192
_SAMPLE = 256


def _twin() -> Callable:
    from .head_gate_triton import head_gate

    return head_gate


def _fit(out: Tensor, logits: Tensor, *, fast: bool = False, quantize: bool = False) -> Hashable:
    demand(out.dim() == 3 and out.numel() > 0, "shape")
    demand(logits.shape[:2] == out.shape[:2] and logits.dim() == 3, "shape")
    heads, width = logits.shape[2], out.shape[2]
    demand(power_of_two(heads) and power_of_two(width) and heads <= width <= WIDEST, "heads not a power of two")
    demand_like(out, logits)
    return width, heads, fast, quantize


def _sample(out: Tensor, logits: Tensor, *, fast: bool = False, quantize: bool = False) -> tuple[tuple, dict]:
    return (out[:, :_SAMPLE], logits[:, :_SAMPLE]), {"fast": fast, "quantize": quantize}


@operation(twin=_twin, fit=_fit, sample=_sample, contract=CLOSE)
def head_gate(out: Tensor, logits: Tensor, *, fast: bool = False, quantize: bool = False) -> Any:
    """Multiply each head by ``2 * sigmoid(logit)``.

    out: [B, T, H * D]; logits: [B, T, H]. Sigmoid and product round to out's dtype in turn (ltx-core 1.2); ``fast`` rounds
    once. With ``quantize`` returns no more than its ``Quantized`` rows.
    """
    gated = (rounded_once(_gated) if fast else _gated)(out, logits)
    return quantize_rows.definition(gated) if quantize else gated


def _gated(out: Tensor, logits: Tensor) -> Tensor:
    gates = 2 * torch.sigmoid(logits)
    return (out.unflatten(-1, (logits.shape[-1], -1)) * gates[..., None]).flatten(2)
