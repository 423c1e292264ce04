"""Whether tensors hold numbers only, asked once for many, so that nothing waits for the device in between."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, TensorInfo
from .errors import lora_error, shown

Entry = tuple[Checkpoint, TensorInfo, Tensor]

# tensors that are asked about together
_GROUP = 64


class FiniteCheck:
    """Collects tensors that were read, and names the first bad one when asked.

    Many small questions cost more than the answers, so tensors wait until there is a group of them.
    """

    def __init__(self) -> None:
        self._waiting: list[Entry] = []
        self._noted: list[Entry] = []

    def note(self, file: Checkpoint, info: TensorInfo, tensor: Tensor) -> None:
        """Note a tensor of a file; of most of them only a flag is kept."""
        if info.size_bytes:
            self._waiting.append((file, info, tensor))
            if len(self._waiting) >= _GROUP:
                self._ask()

    def _ask(self) -> None:
        waiting, self._waiting = self._waiting, []
        for entries in _alike(waiting):
            # the largest magnitude is a number exactly where all values are
            largest = torch._foreach_norm([tensor for *_, tensor in entries], float("inf"))
            self._noted += [(file, info, one) for (file, info, _), one in zip(entries, largest, strict=True)]

    def finish(self) -> None:
        """Wait for the device and forget what was noted. Raises LoraError naming a tensor that was no number."""
        self._ask()
        noted, self._noted = self._noted, []
        for entries in _alike(noted):
            flags = torch.stack([largest for *_, largest in entries]).isfinite().tolist()
            for (file, info, _), good in zip(entries, flags, strict=True):
                if not good:
                    problem = f"tensor {shown(info.name)} has values that are no numbers"
                    raise lora_error(file, problem, "get the file again")


def _alike(entries: list[Entry]) -> Iterable[list[Entry]]:
    """Entries whose tensors have one device and dtype together."""
    groups: dict[tuple[torch.device, torch.dtype], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry[2].device, entry[2].dtype), []).append(entry)
    return groups.values()
