"""The precision in which operations compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .rows import Rows


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rounded_once(compute: Callable[..., Any]) -> Callable[..., Any]:
    """The ``fast`` form of a definition: the same formula on float32 copies, each result rounded once.

    Results take the dtype of the first argument. Arguments and results may be nested in tuples.
    """

    def fast(first: Tensor, *others: Any) -> Any:
        widened = (_converted(value, torch.float32) for value in (first, *others))
        return _converted(compute(*widened), first.dtype)

    return fast


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating-point tensor in ``dtype``."""
    if isinstance(value, tuple):
        return tuple(_converted(part, dtype) for part in value)
    if isinstance(value, Rows) or (isinstance(value, Tensor) and value.is_floating_point()):
        return value.to(dtype)
    return value
