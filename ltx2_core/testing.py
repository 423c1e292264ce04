"""Comparison of tensors for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the reference's largest value (or to 1 if that is smaller)."""
    if got.shape != want.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, want {tuple(want.shape)}")
    if got.numel() == 0:
        return 0.0
    if not bool(got.isfinite().all()):
        raise AssertionError(f"{int((~got.isfinite()).sum())} of {got.numel()} elements are not finite")
    scale = max(float(want.double().abs().max()), 1.0)
    return float((got.double() - want.double()).abs().max()) / scale


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Fail unless ``relative_error`` stays within ``tolerance``; the figure is printed either way (pytest -s)."""
    error = relative_error(got, want)
    print(f"{name}: {error:.2e} (allowed {tolerance:.0e})")  # noqa: T201
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"


def cosine(got: Tensor, want: Tensor) -> float:
    """Cosine between two tensors, in float64."""
    a, b = got.double().flatten(), want.double().flatten()
    return float((a @ b) / (a.norm() * b.norm()))


def unfold_blocks(tensors: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Repeat each entry named ``...transformer_blocks.N...`` for blocks 0 to num_layers - 1; others stay as they are."""
    mark = "transformer_blocks.N."
    once = {name: value for name, value in tensors.items() if mark not in name}
    return once | {
        name.replace(mark, f"transformer_blocks.{i}."): value
        for i in range(num_layers)
        for name, value in tensors.items()
        if mark in name
    }
