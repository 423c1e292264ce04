"""Matrix products that have a faster form in the library, in the form of fused operations for bench_kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pack  # noqa: F401
import torch
import torch.nn.functional as F
from ltx2_engine import kernels
from ltx2_engine.ltx2_core.testing import cosine
from own_model import Draw
from random_model import STD
from step_check import lowest
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """Both forms take the same arguments, of which each uses its own. least_cosine: between their results."""

    name: str
    definition: Callable[..., Tensor]
    twin: Callable[..., Tensor]
    least_cosine: float

    @property
    def contract(self) -> Product:
        return self

    def difference(self, want: Tensor, got: Tensor) -> str | None:
        """What is wrong with ``got``, in words, or None."""
        alike = lowest([cosine(a, b) for a, b in zip(got[0].split(1024), want[0].split(1024), strict=True)])
        return None if alike >= self.least_cosine else f"cosine {alike:.6f}, at least {self.least_cosine}"

    def warm_up(self, *_: Any) -> None:
        return None


def products() -> dict[str, Product]:
    """Those that there are, by name."""
    found = []
    if hasattr(kernels, "gelu_linear"):
        exact, fast = (partial(kernels.gelu_linear, fast=fast) for fast in (False, True))
        found.append(Product("gelu_linear", exact, fast, 0.9999))
    if hasattr(kernels, "fp8_linear"):
        # eight-bit factors have 3 % of noise each
        found.append(Product("fp8_linear", _in_sixteen_bits, _in_eight_bits, 0.998))
    return {product.name: product for product in found}


def linear(rows: int, width: int, out: int, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weight and bias."""
    return draw(1, rows, width), draw(out, width).mul_(STD), draw(out).mul_(STD)


def both_widths(rows: int, width: int, out: int, draw: Draw) -> tuple[Any, ...]:
    """Tokens, weight and bias, and the first two in eight bits."""
    x, weight, bias = linear(rows, width, out, draw)
    quantize = kernels.quantize_rows.definition
    return x, weight, bias, quantize(x), quantize(weight)


def _in_sixteen_bits(x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> Tensor:
    return F.linear(x, weight, bias)


def _in_eight_bits(x: Tensor, weight: Tensor, bias: Tensor, rows: Any, columns: Any) -> Tensor:
    return kernels.fp8_linear(rows, columns, bias, torch.bfloat16)
