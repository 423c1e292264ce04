"""One network of an engine: on disk until it is used, then on its device until its memory is asked back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import nn

from .host import host

M = TypeVar("M", bound=nn.Module)

# progress is counted in units that are small next to a second of reading
_PROGRESS_UNIT = 1 << 20


class Component(Generic[M]):
    """A network and its place in memory; the host sees it as a resident.

    label: what messages call it. weight_bytes: what it takes on ``device`` when loaded.
    load: reads the weights and returns the network; calls its argument with the bytes read since the last call.
    """

    def __init__(
        self,
        label: str,
        *,
        device: str,
        weight_bytes: int,
        file_bytes: int,
        load: Callable[[Callable[[int], None]], M],
    ):
        self.label = label
        self.device = device
        self.weight_bytes = weight_bytes
        self._file_bytes = file_bytes
        self._load = load
        self._network: M | None = None

    def use(self, activation_bytes: int) -> M:
        """The network on its device, with room for ``activation_bytes`` of work beside it.

        Raises HostOutOfMemory when both do not fit, and the errors of loading.
        """
        host().admit(self, self.device, self.weight_bytes, activation_bytes)
        if self._network is None:
            self._network = self._read()
        return self._network

    def _read(self) -> M:
        read = 0
        total = max(1, self._file_bytes // _PROGRESS_UNIT)
        with host().progress(total, f"loading {self.label}") as progress:

            def on_bytes(count: int) -> None:
                nonlocal read
                read += count
                progress.to(min(total, read // _PROGRESS_UNIT))

            try:
                network = self._load(on_bytes)
            except BaseException:
                host().retire(self)
                raise
            progress.to(total)
            return network

    def bytes_on(self, device: str) -> int:
        return self.weight_bytes if self._network is not None and device == self.device else 0

    def release(self, device: str, wanted: int | None) -> int:
        """Drop the weights; the next use reads them again."""
        freed = self.bytes_on(device)
        if freed:
            self._network = None
        return freed

    def close(self) -> None:
        self._network = None
        host().retire(self)
