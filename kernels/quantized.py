"""A tensor in eight-bit floating point with its scales."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """``data * scale``: data float8_e4m3fn [..., C]; scale float32, [..., 1] (one for each row) or one element."""

    data: Tensor
    scale: Tensor
