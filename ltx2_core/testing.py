"""Comparison of tensors, and of the memory that they take, for tests and benchmarks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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


class LiveBytes(TorchDispatchMode):
    """``peak``: the most bytes that tensors made inside the block hold at any time."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._live, self.peak = 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs or {}))}
        result = operation(*args, **(kwargs or {}))
        for key in [key for key, (storage, _) in self._storages.items() if storage() is None]:
            self._live -= self._storages.pop(key)[1]
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._storages:
                self._storages[storage._cdata] = weakref.ref(storage), storage.nbytes()
                self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)
