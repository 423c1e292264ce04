"""The way back from merged weights to the base: what LoRAs touched, kept as the file has it.

Subtracting a delta from a bfloat16 weight does not give the weight back (7 to 15 % of elements end one unit off), so the
base is kept or read again. A weight that is quantised when it is read is merged before it is, so its quantised base, which
a pair keeps, is enough for the way back but not for another merge:

pair    base and merged weights side by side on the device: a switch between the two exchanges their values
pinned  a copy of the base in pinned host memory
file    nothing is kept: touched weights are read again
side    nothing is merged: low-rank branches run beside the weights
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Value = Mapping[str, Tensor]

# for people
POLICIES = {
    "pair": "the unchanged ones stay beside them on the device",
    "pinned": "the unchanged ones are kept in pinned host memory",
    "file": "the unchanged ones are read again when the LoRAs change",
    "side": "there is no room for that, so LoRAs run beside the weights",
}

# beside a full device, other work needs some room
_RESERVE = 2 << 30


@dataclass(frozen=True, slots=True)
class Touched:
    """The weights that LoRAs change: their bytes in the network and in the files, and whether every change is low-rank."""

    held_bytes: int
    file_bytes: int
    low_rank: bool


def choose_policy(touched: Touched, work_bytes: int, *, device_free: int | None, host_free: int | None) -> str:
    """The cheapest way back that fits.

    touched: by LoRAs. work_bytes: what the device must have left for activations.
    device_free, host_free: bytes beside the loaded network, None where nobody knows.
    """
    if device_free is None or device_free >= touched.held_bytes + work_bytes + _RESERVE:
        return "pair"
    if host_free is not None and host_free >= 2 * touched.file_bytes + _RESERVE:
        return "pinned"
    return "side" if touched.low_rank else "file"


class Pristine:
    """Base values, and in a pair the merged values that are not in use, by the name of the weight."""

    def __init__(self) -> None:
        # how to keep; None until it is decided, and then nothing is kept
        self.policy: str | None = None
        self._base: dict[str, Value] = {}
        self._stored: dict[str, Value] = {}
        self._merged: dict[str, tuple[object, Value]] = {}

    def base(self, name: str) -> Value | None:
        """The base value, as the network holds it; None when it was not kept."""
        return self._base.get(name)

    def stored(self, name: str, device: torch.device) -> Value | None:
        """The parts of the weight as the file has them, from pinned memory to ``device``; None when they were not kept."""
        parts = self._stored.get(name)
        return None if parts is None else {role: part.to(device, non_blocking=True) for role, part in parts.items()}

    def has(self, name: str) -> bool:
        return name in self._base or name in self._stored

    def has_stored(self, name: str) -> bool:
        """Whether the weight was kept as the file has it."""
        return name in self._stored

    def keep(self, name: str, value: Value) -> None:
        """Keep a base value whose weight gets another."""
        self._base[name] = value

    def keep_stored(self, name: str, parts: Value) -> None:
        """Keep a weight in host memory as the file has it."""
        self._stored[name] = parts

    def has_merged(self, name: str, key: object) -> bool:
        """Whether the merged value that was put aside is the one of ``key``."""
        return name in self._merged and self._merged[name][0] == key

    def take_merged(self, name: str, key: object) -> Value | None:
        """That value, which the network holds from now on."""
        return self._merged.pop(name)[1] if self.has_merged(name, key) else None

    def drop_base(self, name: str) -> None:
        """Forget a base value that the network holds itself."""
        self._base.pop(name, None)

    def put_aside(self, name: str, key: object, value: Value) -> None:
        """Keep a merged value whose weight gets its base back."""
        self._merged[name] = key, value

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is kept; some of it may be in use. May be asked while another thread keeps more."""
        merged = [value for _, value in list(self._merged.values())]
        for value in [*list(self._base.values()), *list(self._stored.values()), *merged]:
            yield from value.values()

    def drop(self) -> None:
        """Forget everything; what was kept has to be read again."""
        self._base.clear()
        self._stored.clear()
        self._merged.clear()
