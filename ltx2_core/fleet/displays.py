"""Progress of workers, shown by the host of the parent."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..host import Progress, host
from ..parallel.messages import Message, MessageError
from ..parallel.placement import is_count


class Displays:
    """The displays of one job, opened and closed as rank 0 says. Used as a context manager, which closes what is left."""

    def __init__(self) -> None:
        self._open: dict[int, _Shown] = {}

    def __enter__(self) -> Displays:
        return self

    def __exit__(self, *exc: object) -> None:
        for shown in reversed(self._open.values()):
            shown.stack.close()

    def show(self, _: int, message: Message) -> None:
        """An event of a worker; raises what the host's display raises when the user interrupts."""
        number = _count(message, "display")
        if message.body.get("done") is True:
            if number in self._open:
                self._open.pop(number).stack.close()
            return
        value, total, label = _count(message, "value"), _count(message, "total"), str(message.body.get("label"))
        if number not in self._open:
            stack = contextlib.ExitStack()
            self._open[number] = _Shown(stack, stack.enter_context(host().progress(total, label)))
        picture = message.tensor("picture", torch.uint8, (None, None, 3)) if "picture" in message.tensors else None
        self._open[number].report(value, total, picture)


def _count(message: Message, name: str) -> int:
    found = message.body.get(name)
    if not is_count(found):
        raise MessageError(f"{name} of a worker's progress must be a count, found {str(found)[:100]!r}")
    return int(found)  # type: ignore[arg-type]


@dataclass
class _Shown:
    """One open display. value: what it shows."""

    stack: contextlib.ExitStack
    progress: Progress
    value: int = 0

    def report(self, value: int, total: int, picture: Tensor | None) -> None:
        step, self.value = value - self.value, value
        if picture is None:
            self.progress.to(value, total)
        else:
            # hosts take pictures with steps
            self.progress.step(step, picture.numpy())
