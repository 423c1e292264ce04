"""The machinery of ``staged.py``: threads that read chunks of files, and the memory that the bytes go to.

A chunk is a run of bytes of one file that belong to one or more tensors. Tensors in host memory are read into
directly; bytes for another device are read into a slot, a pinned buffer, and copied from there while the next are read.
Chunk number n uses slot n modulo the number of slots, so a slot is free when the chunk that had it has been waited for
and the copies out of it are over.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from io import FileIO
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from ..host import Interrupted
from .checkpoint import Checkpoint, CheckpointError, TensorInfo

log = logging.getLogger("ltx2.loading")

# a power of two: pinned memory is handed out in powers of two
CHUNK_BYTES = 32 * 1024 * 1024
# what slow disks are asked for at once, so that a stop takes effect within a second
MIN_CHUNK_BYTES = 4 * 1024 * 1024
SLOTS = 16
MAX_THREADS = 12
# below os.preadv's limit of 1024 buffers
_MAX_TENSORS = 256
# waiting for a disk takes no core
_MIN_THREADS = 4
# how long a chunk may take before the next ones are smaller, and within what time they may be larger
_SLOW_SECONDS, _FAST_SECONDS = 0.25, 0.05
_POLL_SECONDS = 0.05

# os.preadv lets threads share an open file; elsewhere each thread has its own
_POSITIONED = hasattr(os, "preadv")


@dataclass(frozen=True)
class Request:
    """A tensor to be read. tag: the caller's, handed back with the tensor."""

    file: Checkpoint
    info: TensorInfo
    tag: Hashable = None


@dataclass(eq=False)
class Landing:
    """A tensor and the request that it answers.

    target: its bytes, writable memory of the host (a memoryview) or a flat uint8 tensor of another device. fresh: made
    for the request, not given by the caller. events: one for each copy into it.
    """

    request: Request
    tensor: Tensor
    target: Any
    fresh: bool
    events: list[Any] = field(default_factory=list)

    @property
    def in_host_memory(self) -> bool:
        return isinstance(self.target, memoryview)


@dataclass(eq=False)
class Chunk:
    """Bytes [begin, begin + size) of a file; size grows to ``limit``.

    parts: where they go, in order. complete: (place in the chunk, landing) of every tensor that ends here. reached: how
    many bytes were read. error: why it was not all of them; valid, as ``reached`` is, once the chunk is done.
    """

    file: Checkpoint
    begin: int
    in_host_memory: bool
    limit: int
    parts: list[tuple[Landing, Any]] = field(default_factory=list)
    complete: deque[tuple[int, Landing]] = field(default_factory=deque)
    size: int = 0
    reached: int = 0
    error: CheckpointError | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def full(self) -> bool:
        return self.size >= self.limit or len(self.complete) >= _MAX_TENSORS

    def continued_by(self, landing: Landing) -> bool:
        request = landing.request
        here = self.file, self.begin + self.size, self.in_host_memory
        return here == (request.file, request.info.begin, landing.in_host_memory)

    def add(self, landing: Landing, offset: int) -> int:
        """Append a tensor's bytes from ``offset`` on, as many as there is room for; returns how many."""
        left = landing.request.info.size_bytes - offset
        count = min(left, self.limit - self.size)
        if count:
            self.parts.append((landing, landing.target[offset : offset + count]))
            self.size += count
        if count == left:
            self.complete.append((self.size, landing))
        return count


# memory --------------------------------------------------------------------------------------------------------------


class Target:
    """A device that tensors are read to, with copies that are over when ``copy`` returns."""

    def __init__(self, device: torch.device):
        self.device = device

    def begin(self) -> None:
        """Called first, in the thread of whoever consumes the tensors."""

    def enter_thread(self) -> None:
        """Called first in every thread that copies."""

    def slot(self, size: int) -> Tensor:
        """Host memory that ``copy`` may be given: uint8 [size]."""
        return torch.empty(size, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def is_host_memory(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def borrow(self, tensor: Tensor) -> None:
        """Later copies may overwrite the caller's tensor."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Copy (to, from) pairs; returns an event whose ``synchronize`` waits for that, or None when it is over."""
        for to, source in pairs:
            to.copy_(source)
        return None

    def hand_over(self, landing: Landing) -> None:
        """What the caller's stream does next with the tensor comes after the copies into it."""

    def close(self) -> None:
        """What the caller's stream does next comes after every copy."""


class CudaTarget(Target):
    """A CUDA device: copies on a stream of their own, from pinned memory where it can be had."""

    def __init__(self, device: torch.device):
        super().__init__(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))
        self._stream = _copy_stream(self.device.index)
        self._pinning = threading.Lock()
        self._pinned = True

    def begin(self) -> None:
        # asked for once: that takes long, and there are thousands of tensors
        self._consumer = torch.cuda.current_stream(self.device)
        self._current = torch.cuda.current_stream()

    def enter_thread(self) -> None:
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(self._stream)

    def slot(self, size: int) -> Tensor:
        with self._pinning:
            if self._pinned:
                try:
                    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
                except RuntimeError as error:
                    log.warning("no pinned memory (%s): files are read at about half the speed", error)
                    self._pinned = False
        return super().slot(size)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # memory that the copy stream may write to without waiting for the caller's
        torch.cuda.set_stream(self._stream)
        try:
            return super().empty(shape, dtype)
        finally:
            # of the caller's device, which may be another one
            torch.cuda.set_stream(self._current)

    def borrow(self, tensor: Tensor) -> None:
        self._stream.wait_stream(self._consumer)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        for to, source in pairs:
            to.copy_(source, non_blocking=True)
        # blocking: a thread that waits for it sleeps
        event = torch.cuda.Event(blocking=True)
        event.record()
        return event

    def hand_over(self, landing: Landing) -> None:
        for event in landing.events:
            self._consumer.wait_event(event)
        if landing.fresh:
            landing.tensor.record_stream(self._consumer)

    def close(self) -> None:
        self._consumer.wait_stream(self._stream)


@functools.cache
def _copy_stream(index: int) -> torch.cuda.Stream:
    """One stream a device for good: freed memory is kept for the stream that it was allocated on."""
    return torch.cuda.Stream(torch.device("cuda", index))


def target_of(device: torch.device) -> Target:
    return CudaTarget(device) if device.type == "cuda" else Target(device)


@dataclass(eq=False)
class _Slot:
    memory: Tensor | None = None
    event: Any = None


# files ---------------------------------------------------------------------------------------------------------------


class _Changed(Exception):
    pass


class _Files:
    """The files that are being read, each opened when it is first needed."""

    def __init__(self) -> None:
        self._open: dict[tuple[Checkpoint, int], FileIO] = {}
        self._lock = threading.Lock()

    def get(self, checkpoint: Checkpoint) -> FileIO:
        key = checkpoint, 0 if _POSITIONED else threading.get_ident()
        with self._lock:
            if key not in self._open:
                file = FileIO(checkpoint.path)
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != (checkpoint.size_bytes, checkpoint.mtime_ns):
                    file.close()
                    raise _Changed
                self._open[key] = file
            return self._open[key]

    def close(self) -> None:
        for file in self._open.values():
            file.close()


def _read_at(file: FileIO, buffers: Sequence[memoryview], offset: int) -> int:
    """Read into buffers, one after another, from a place in the file; how many bytes, 0 at the end of the file."""
    if _POSITIONED:
        return os.preadv(file.fileno(), buffers, offset)
    file.seek(offset)
    return file.readinto(buffers[0]) or 0


def _from(buffers: Sequence[memoryview], start: int) -> Sequence[memoryview]:
    """What is left of buffers that lie end to end, without the first ``start`` bytes."""
    if not start:
        return buffers
    for index, buffer in enumerate(buffers):
        if start < len(buffer):
            return [buffer[start:], *buffers[index + 1 :]]
        start -= len(buffer)
    return []


def _failure(chunk: Chunk, error: Exception) -> CheckpointError:
    """What is said of a chunk that could not be read on; names the tensor that it was in."""
    position = 0
    for landing, view in chunk.parts:
        info, position = landing.request.info, position + len(view)
        if chunk.reached < position:
            break
    else:
        info = chunk.complete[-1][1].request.info
    path, name = chunk.file.path, repr(info.name[:200])
    if isinstance(error, EOFError):
        found = f"the file ends {info.end - chunk.begin - chunk.reached} bytes before the end of tensor {name}"
        remedy = "it was cut short after its header was read: download it again"
    elif isinstance(error, OSError):
        found, remedy = f"reading failed ({error.strerror or error}) at tensor {name}", "check the disk"
    else:
        found, remedy = f"the file was changed after its header was read (at tensor {name})", "load the model again"
    return CheckpointError(f"{path}: {found}: {remedy}")


# threads -------------------------------------------------------------------------------------------------------------


class QuickSwitches:
    """While any of these is entered, threads of Python take turns every half millisecond instead of every five.

    A reader needs its turn a few times for every chunk, and whoever consumes the tensors is busy all the while.
    """

    _SECONDS = 0.0005
    _lock = threading.Lock()
    _entered = 0
    _before = 0.0

    def __enter__(self) -> None:
        kind = QuickSwitches
        with kind._lock:
            if kind._entered == 0:
                kind._before = sys.getswitchinterval()
                sys.setswitchinterval(min(kind._before, kind._SECONDS))
            kind._entered += 1

    def __exit__(self, *exc: object) -> None:
        kind = QuickSwitches
        with kind._lock:
            kind._entered -= 1
            if kind._entered == 0:
                sys.setswitchinterval(kind._before)


class Readers:
    """Threads that read chunks, started as chunks come. At most ``depth`` chunks may be submitted and not waited for.

    chunk_bytes: how large the next chunk should be, less on slow disks. stopped: polled in all threads.
    """

    def __init__(self, target: Target, stopped: Callable[[], bool], threads: int | None):
        self.chunk_bytes = min(MIN_CHUNK_BYTES, CHUNK_BYTES)
        self._target = target
        self._stopped = stopped
        self._limit = max(1, threads or _default_threads())
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._submitted = 0
        self._jobs: SimpleQueue[tuple[Chunk, _Slot] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._files = _Files()
        self._end = False
        self._error: BaseException | None = None

    @property
    def depth(self) -> int:
        return len(self._slots)

    def submit(self, chunk: Chunk) -> None:
        self._jobs.put((chunk, self._slots[self._submitted % len(self._slots)]))
        self._submitted += 1
        if len(self._threads) < self._limit:
            # a daemon: a generator that nobody closes must not keep the program from ending
            thread = threading.Thread(target=self._run, name=f"ltx2 reader {len(self._threads)}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def wait(self, chunk: Chunk) -> None:
        """Return when the chunk is done. Raises Interrupted, and what went wrong in a thread outside of its file."""
        while True:
            done = chunk.done.wait(_POLL_SECONDS)
            if self._error is not None:
                raise self._error
            if self._over():
                raise Interrupted("reading was stopped")
            if done:
                return

    def close(self) -> None:
        """Stop; returns when no thread is left, and lets go of all memory."""
        self._end = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._error = None
        self._slots.clear()
        self._files.close()
        self._target.close()

    def _over(self) -> bool:
        self._end = self._end or self._stopped()
        return self._end

    def _run(self) -> None:
        try:
            # copies need none of autograd's bookkeeping
            with torch.inference_mode():
                self._target.enter_thread()
                while (job := self._jobs.get()) is not None and not self._over():
                    self._fill(*job)
        except BaseException as error:
            self._error = error

    def _fill(self, chunk: Chunk, slot: _Slot) -> None:
        if chunk.in_host_memory:
            self._read(chunk, [view for _, view in chunk.parts])
        else:
            memory = self._free(slot)
            self._read(chunk, [memory[: chunk.size].numpy().data])
            slot.event = self._copy(chunk, memory)
        # a landing is the consumer's alone from now on, and goes when the consumer drops it
        chunk.parts.clear()
        chunk.done.set()

    def _free(self, slot: _Slot) -> Tensor:
        """The slot's memory when nothing is copied from it any more."""
        if slot.memory is None:
            slot.memory = self._target.slot(CHUNK_BYTES)
        if slot.event is not None:
            slot.event.synchronize()
        return slot.memory

    def _read(self, chunk: Chunk, buffers: Sequence[memoryview]) -> None:
        started = time.monotonic()
        try:
            file = self._files.get(chunk.file)
            while chunk.reached < chunk.size and not self._over():
                count = _read_at(file, _from(buffers, chunk.reached), chunk.begin + chunk.reached)
                if not count:
                    raise EOFError
                chunk.reached += count
        except (OSError, EOFError, _Changed) as error:
            chunk.error = _failure(chunk, error)
            # without its traceback, whose frames would hold the chunk and with it tensors
            chunk.error.__cause__ = error.with_traceback(None)
        self._adapt(time.monotonic() - started, chunk.size)

    def _copy(self, chunk: Chunk, memory: Tensor) -> Any:
        pairs, position = [], 0
        for _, view in chunk.parts:
            start, position = position, position + len(view)
            if position <= chunk.reached:
                pairs.append((view, memory[start:position]))
        event = self._target.copy(pairs)
        if event is not None:
            for landing, _ in chunk.parts:
                landing.events.append(event)
        return event

    def _adapt(self, seconds: float, size: int) -> None:
        if seconds > _SLOW_SECONDS:
            self.chunk_bytes = max(min(MIN_CHUNK_BYTES, CHUNK_BYTES), self.chunk_bytes // 2)
        elif seconds < _FAST_SECONDS and size >= self.chunk_bytes:
            self.chunk_bytes = min(CHUNK_BYTES, self.chunk_bytes * 2)


def _default_threads() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, max(_MIN_THREADS, usable))
