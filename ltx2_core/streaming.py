"""Blocks whose weights lie in host memory and visit the device one after the other while the network runs.

A block's tensors lie in one arena, so one copy moves them all. While a block computes, the next one is copied on a stream
of its own. Events keep copies and computation apart; the host waits for neither.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .loading.arena import Arena


class Transfers(Protocol):
    """How bytes reach a device's buffers, and what waits for what. Marks are points in the order of work; None is past."""

    def mark(self) -> Any:
        """The point where all computation asked for so far is done."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy once ``after`` is reached; returns the point where the copy is done."""

    def wait(self, copied: Any) -> None:
        """Let computation that is asked for from now on begin when a copy is done."""

    def settle(self) -> None:
        """Wait until nothing is under way."""


class _GpuTransfers:
    """Copies on a stream of their own; computation on the stream that is current when it is asked for."""

    def __init__(self, device: torch.device):
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        self._copies.wait_event(after)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        return self._copies.record_event()

    def wait(self, copied: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(copied)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)


class _HostTransfers:
    """Copies within host memory, done when they are asked for."""

    def mark(self) -> None: ...

    def copy(self, target: Tensor, source: Tensor, after: None) -> None:
        target.copy_(source)

    def wait(self, copied: None) -> None: ...
    def settle(self) -> None: ...


class _Slot:
    """A buffer on the device.

    block: which one it holds or is being filled with. filled: the point where that is done. free: the point where
    nothing reads what it held.
    """

    def __init__(self, buffer: Tensor, free: Any):
        self.buffer, self.free = buffer, free
        self.filled: Any = None
        self.block: int | None = None
        self._views: dict[tuple, tuple[Tensor, ...]] = {}

    def views(self, arena: Arena) -> tuple[Tensor, ...]:
        if arena.layout not in self._views:
            self._views[arena.layout] = arena.views(self.buffer)
        return self._views[arena.layout]


class BlockStream:
    """Runs blocks of a network from host memory through a few buffers on a device.

    blocks: in the order in which the network calls them, each any number of times before it goes on to the next; after
    the last it begins again. Any other order is right too but copies more. Their tensors are moved into arenas.
    slots: buffers on the device, each as large as the largest block; all but one are filled ahead of time.

    A block's tensors are on the device during its call and in host memory otherwise. Only a call that an interrupt ended
    leaves them on the device, until the next call or ``release``.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        device: torch.device | str,
        slots: int = 2,
        transfers: Transfers | None = None,
    ):
        """transfers: another way to copy, for tests."""
        if slots < 1:
            raise ValueError(f"blocks need a slot on the device to run in, got {slots}")
        self.device = torch.device(device)
        self.copies = 0
        self._arenas = [Arena.of(block) for block in blocks]
        self._num_slots = min(slots, len(self._arenas))
        self._transfers = transfers or _transfers(self.device)
        self._slots: list[_Slot] = []
        self._running: _Slot | None = None
        self._pointed: Arena | None = None
        # a stream that is dropped with its network may have copies under way
        self._settled = weakref.finalize(self, self._transfers.settle)
        self._settled.atexit = False
        self._hooks = [
            hook
            for number, block in enumerate(blocks)
            for hook in (
                block.register_forward_pre_hook(functools.partial(self._enter, number)),
                block.register_forward_hook(self._leave, always_call=True),
            )
        ]

    @property
    def arena_bytes(self) -> int:
        """Host memory of the blocks."""
        return sum(arena.size_bytes for arena in self._arenas)

    @property
    def slot_bytes(self) -> int:
        """Device memory of the slots; they are made when they are needed."""
        return self._num_slots * max((arena.size_bytes for arena in self._arenas), default=0)

    @property
    def device_bytes(self) -> int:
        """Device memory that is taken now: that of the slots or none."""
        return self.slot_bytes if self._slots else 0

    def release(self) -> None:
        """Give the slots back until the next call of a block, and wait for copies that are under way.

        To be called before weights in host memory are changed.
        """
        self._transfers.settle()
        self._leave()
        self._running = None
        self._slots = []

    def close(self) -> None:
        """End streaming; the blocks stay in host memory."""
        for hook in self._hooks:
            hook.remove()
        self.release()
        self._settled.detach()
        self._hooks, self._arenas, self._num_slots = [], [], 0

    def _enter(self, number: int, *_: Any) -> None:
        self._leave()  # a block that was interrupted
        if self._running is None or self._running.block != number:
            self._running = self._next(number)
        self._pointed = self._arenas[number]
        self._pointed.point(self._running.views(self._pointed))

    def _leave(self, *_: Any) -> None:
        if self._pointed is not None:
            self._pointed.restore()
            self._pointed = None

    def _next(self, number: int) -> _Slot:
        """Release the slot that ran before, see to it that this block and those behind it are copied, and wait for it."""
        if self._running is not None:
            self._running.free = self._transfers.mark()
        if not self._slots:
            self._slots = self._new_slots()
        wanted = [(number + ahead) % len(self._arenas) for ahead in range(len(self._slots))]
        held = {slot.block: slot for slot in self._slots if slot.block in wanted}
        available = [slot for slot in self._slots if slot.block not in wanted]
        for missing in wanted:
            if missing not in held:
                held[missing] = self._fill(available.pop(), missing)
        self._transfers.wait(held[number].filled)
        return held[number]

    def _new_slots(self) -> list[_Slot]:
        size = max(arena.size_bytes for arena in self._arenas)
        # computation that was asked for before may still read the memory that they get
        return [_Slot(_bytes(size, self.device), self._transfers.mark()) for _ in range(self._num_slots)]

    def _fill(self, slot: _Slot, number: int) -> _Slot:
        memory = self._arenas[number].memory
        slot.filled = self._transfers.copy(slot.buffer[: memory.nbytes], memory, slot.free)
        slot.block = number
        self.copies += 1
        return slot


def _transfers(device: torch.device) -> Transfers:
    return _GpuTransfers(device) if device.type == "cuda" else _HostTransfers()


def _bytes(count: int, device: torch.device | str = "cpu") -> Tensor:
    # a normal tensor, which may be written inside and outside of inference mode
    with torch.inference_mode(False):
        return torch.empty(count, dtype=torch.uint8, device=device)
