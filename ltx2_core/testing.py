"""Comparison of tensors for tests and benchmarks."""

from __future__ import annotations

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
