"""The machinery of ``staged.py``: threads that read chunks of files, and the memory that the bytes go to.

A chunk is a run of bytes of one file that belong to one or more tensors: what the consumer waits for at once. Threads read
it in stretches. Tensors in host memory are read into directly; bytes for another device are read into a slot, a pinned
buffer, and copied from there while the next are read. A slot is used again when the copies out of it are over.

Copies are begun by the consumer, whenever it comes to ask for more: Python's threads take turns, every operation on a tensor
ends a thread's turn, and the next is long in coming while the consumer is busy. A reader needs one turn a stretch.

All slots together are small, for the processor's last cache: what a thread has written there the device then reads from
there. Through larger ones every byte would go by way of the memory twice, which threads and device share.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..host import Interrupted
from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .pinned import PinnedMemory

log = logging.getLogger("ltx2.loading")

CHUNK_BYTES = 32 * 1024 * 1024
# what slow disks are asked for at once, so that a stop takes effect within a second
MIN_CHUNK_BYTES = 4 * 1024 * 1024
# how many chunks have their places in memory before the consumer gets to them
DEPTH = 24
SLOT_BYTES = 16 * 1024 * 1024
# slots that are copied from while every thread has one
_SPARE_SLOTS = 4
# together they copy faster than a link takes it
MAX_THREADS = 12
# below os.preadv's limit of 1024 buffers
_MAX_TENSORS = 256
# waiting for a disk takes no core, so a few threads are worth more than cores
_MIN_THREADS = 4
# for whoever consumes the tensors (it makes memory for them and merges LoRAs) and for the rest of the program: readers of
# cached files copy all the time, and with one on every core the thread that they all wait for runs late
_OTHER_CORES = 2
# how long a stretch may take before the next chunks are smaller, and within what time they may be larger
_SLOW_SECONDS, _FAST_SECONDS = 0.25, 0.05
_POLL_SECONDS = 0.05

# slots of readings that are over, for the next: pinning takes long
_idle: list[PinnedMemory] = []
_idle_lock = threading.Lock()

# os.preadv lets threads share an open file; elsewhere each thread has its own
_POSITIONED = hasattr(os, "preadv")


class Request(NamedTuple):
    """A tensor to be read.

    tag: the caller's, handed back with the tensor. shared: it may lie in one piece of memory with others near
    it in the file, which goes when all of them do; good for small tensors and for those that are needed for a moment only.
    """

    file: Checkpoint
    info: TensorInfo
    tag: Any = None
    shared: bool = False


class Room(NamedTuple):
    """A tensor that bytes are to be read into, and where it lies: from ``offset`` on in ``memory``, flat uint8.

    Neighbours in a file that are neighbours in one memory too are copied together.
    """

    tensor: Tensor
    memory: Tensor
    offset: int


@dataclass(eq=False, slots=True)
class Landing:
    """A tensor and the request that it answers.

    target: memory whose bytes from ``base`` on are the tensor's, writable memory of the host (a memoryview) or a flat
    uint8 tensor of another device.
    """

    request: Request
    tensor: Tensor
    target: Any
    base: int = 0

    @property
    def in_host_memory(self) -> bool:
        return isinstance(self.target, memoryview)


@dataclass(eq=False, slots=True)
class Piece:
    """Bytes [begin, end) of a target."""

    target: Any
    begin: int
    end: int


@dataclass(eq=False, slots=True)
class Stretch:
    """Bytes [begin, end) of a chunk, ``reached`` of which have been read; error: why that is not all of them."""

    begin: int
    end: int
    reached: int = 0
    error: Exception | None = None


@dataclass(eq=False)
class Chunk:
    """Bytes [begin, begin + size) of a file; size grows to ``limit``.

    parts: (landing, how many bytes), in order. pieces: where they go, in order, as long as possible. complete: (place in
    the chunk, landing) of every tensor that ends here. stretches: what threads read of it, ``left`` of them are not over.
    reached: how many bytes were read. error: why it was not all of them. copied: the event that its copies end with. These
    three are valid once none is left. ready: the event after which nothing reads any more what lay in the memory
    before; None when the copies wait for it already.
    """

    file: Checkpoint
    begin: int
    in_host_memory: bool
    limit: int
    parts: list[tuple[Landing, int]] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    complete: deque[tuple[int, Landing]] = field(default_factory=deque)
    size: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    left: int = 0
    reached: int = 0
    error: CheckpointError | None = None
    copied: Any = None
    ready: Any = None

    @property
    def full(self) -> bool:
        return self.size >= self.limit or len(self.complete) >= _MAX_TENSORS

    def continued_by(self, landing: Landing) -> bool:
        request = landing.request
        return (
            self.begin + self.size == request.info.begin
            and self.file is request.file
            and self.in_host_memory == landing.in_host_memory
        )

    def add(self, landing: Landing, offset: int) -> int:
        """Append a tensor's bytes from ``offset`` on, as many as there is room for; returns how many."""
        left = landing.request.info.size_bytes - offset
        count = min(left, self.limit - self.size)
        if count:
            self.parts.append((landing, count))
            self._add_piece(landing.target, landing.base + offset, count)
            self.size += count
        if count == left:
            self.complete.append((self.size, landing))
        return count

    def _add_piece(self, target: Any, begin: int, count: int) -> None:
        last = self.pieces[-1] if self.pieces else None
        if last is not None and last.target is target and last.end == begin:
            last.end += count
        else:
            self.pieces.append(Piece(target, begin, begin + count))

    def split(self, size: int) -> list[Stretch]:
        """Make its stretches, of so many bytes."""
        ends = range(0, max(self.size, 1), size)
        self.stretches = [Stretch(begin, min(begin + size, self.size)) for begin in ends]
        self.left = len(self.stretches)
        return self.stretches

    def within(self, stretch: Stretch) -> Iterator[tuple[Any, int, int]]:
        """The targets of a stretch's bytes, in order, as (target, begin, end) with places in the target."""
        position = 0
        for piece in self.pieces:
            begin, end = max(stretch.begin - position, 0), stretch.end - position
            position += piece.end - piece.begin
            if begin < piece.end - piece.begin and end > begin:
                yield piece.target, piece.begin + begin, min(piece.begin + end, piece.end)

    def finish(self) -> None:
        """Sum up its stretches, when none is left, and let go of what was needed to read them."""
        for stretch in self.stretches:
            self.reached += stretch.reached
            if stretch.error is not None:
                self.error = _failure(self, stretch.error)
            if stretch.begin + stretch.reached < stretch.end:
                break
        # a landing is the consumer's alone from now on, and goes when the consumer drops it
        self.parts.clear()
        self.pieces.clear()
        self.stretches.clear()


# memory --------------------------------------------------------------------------------------------------------------


class Target:
    """A device that tensors are read to, with copies that are over when ``copy`` returns."""

    def __init__(self, device: torch.device):
        self.device = device

    def begin(self) -> None:
        """Called first, in the thread of whoever consumes the tensors."""

    def enter_thread(self) -> None:
        """Called first in every thread that makes slots."""

    def slot(self, size: int) -> PinnedMemory:
        """Host memory of at least that size that ``copy`` may be given."""
        with _idle_lock:
            fitting = next((memory for memory in _idle if memory.memory.nbytes >= size), None)
            if fitting is not None:
                _idle.remove(fitting)
                return fitting
        return PinnedMemory(size)

    def give_back(self, slots: Sequence[PinnedMemory]) -> None:
        """Slots that nothing is copied from any more."""
        with _idle_lock:
            room = max(MAX_THREADS + _SPARE_SLOTS - len(_idle), 0)
            _idle.extend(slots[:room])

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def is_host_memory(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def mark(self) -> Any:
        """The point up to which the caller's stream has been told what to do, for ``copy``; in the caller's thread."""
        return None

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Begin to copy (to, from) pairs, after a mark if one is given; in the consumer's thread.

        Returns an event whose ``query`` tells whether these copies and all before them are over and whose ``synchronize``
        waits for that, or None when they are.
        """
        for to, source in pairs:
            to.copy_(source)
        return None

    def hand_over(self, copied: Any) -> None:
        """What the caller's stream does next comes after the copies that end with this event."""

    def close(self) -> None:
        """What the caller's stream does next comes after every copy."""


class CudaTarget(Target):
    """A CUDA device: copies on a stream of their own, from pinned memory where it can be had."""

    def __init__(self, device: torch.device):
        super().__init__(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))
        self._stream = _copy_stream(self.device.index)

    def begin(self) -> None:
        # asked for once: that takes long, and there are thousands of tensors
        self._consumer = torch.cuda.current_stream(self.device)
        self._current = torch.cuda.current_stream()

    def enter_thread(self) -> None:
        torch.cuda.set_device(self.device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # memory that the copy stream may write to without waiting for the caller's
        torch.cuda.set_stream(self._stream)
        try:
            return super().empty(shape, dtype)
        finally:
            # of the caller's device, which may be another one
            torch.cuda.set_stream(self._current)

    def mark(self) -> torch.cuda.Event:
        # memory that the caller gave, or freed, may still be read by its stream
        return self._consumer.record_event()

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event | None) -> torch.cuda.Event:
        torch.cuda.set_stream(self._stream)
        try:
            if after is not None:
                self._stream.wait_event(after)
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            # blocking: a thread that waits for it sleeps
            event = torch.cuda.Event(blocking=True)
            event.record()
            return event
        finally:
            torch.cuda.set_stream(self._current)

    def hand_over(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            self._consumer.wait_event(copied)

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
    memory: PinnedMemory | None = None
    # the same bytes for os.preadv, which is asked often
    buffer: memoryview | None = None
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
        file = self._open.get(key)
        if file is not None:
            # nearly always; without the lock, for which threads would wait in turn
            return file
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
    for landing, count in chunk.parts:
        info, position = landing.request.info, position + count
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
    failure = CheckpointError(f"{path}: {found}: {remedy}")
    failure.__cause__ = error
    return failure


# threads -------------------------------------------------------------------------------------------------------------


class Readers:
    """Threads that read chunks, started as chunks come. At most ``depth`` chunks may be submitted and not waited for.

    chunk_bytes: how large the next chunk should be, less on slow disks. stopped: polled in all threads.
    """

    def __init__(self, target: Target, stopped: Callable[[], bool], threads: int | None):
        self.chunk_bytes = min(MIN_CHUNK_BYTES, CHUNK_BYTES)
        self.depth = DEPTH
        self._target = target
        self._stopped = stopped
        self._limit = max(1, threads or _default_threads())
        self._slots = [_Slot() for _ in range(self._limit + _SPARE_SLOTS)]
        self._free: SimpleQueue[_Slot | None] = SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)
        self._jobs: SimpleQueue[tuple[Chunk, Stretch] | None] = SimpleQueue()
        self._fetched: SimpleQueue[tuple[Chunk, Stretch, _Slot | None]] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._files = _Files()
        self._end = False
        self._error: BaseException | None = None

    def submit(self, chunk: Chunk) -> None:
        chunk.ready = self._target.mark()
        for stretch in chunk.split(SLOT_BYTES):
            self._jobs.put((chunk, stretch))
            if len(self._threads) < self._limit:
                # a daemon: a generator that nobody closes must not keep the program from ending
                thread = threading.Thread(target=self._run, name=f"ltx2 reader {len(self._threads)}", daemon=True)
                thread.start()
                self._threads.append(thread)
        with contextlib.suppress(Empty):
            while True:
                self._arrive(*self._fetched.get_nowait())

    def wait(self, chunk: Chunk) -> None:
        """Return when the chunk is done. Raises Interrupted, and what went wrong in a thread outside of its file."""
        while True:
            with contextlib.suppress(Empty):
                while chunk.left:
                    self._arrive(*self._fetched.get(timeout=_POLL_SECONDS))
            if self._error is not None:
                raise self._error
            if self._over():
                raise Interrupted("reading was stopped")
            if not chunk.left:
                return

    def close(self) -> None:
        """Stop; returns when no thread is left, and lets go of all memory."""
        self._end = True
        for _ in self._threads:
            self._free.put(None)
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        # this object lives on in the traceback of an error: it lets go of chunks that nobody came to read
        self._jobs, self._fetched = SimpleQueue(), SimpleQueue()
        self._error = None
        self._return_slots()
        self._files.close()
        self._target.close()

    def _return_slots(self) -> None:
        used = [slot for slot in self._slots if slot.memory is not None]
        for slot in used:
            if slot.event is not None:
                slot.event.synchronize()
        self._target.give_back([slot.memory for slot in used if slot.memory is not None])
        self._slots.clear()
        self._free = SimpleQueue()

    def _over(self) -> bool:
        self._end = self._end or self._stopped()
        return self._end

    def _arrive(self, chunk: Chunk, stretch: Stretch, slot: _Slot | None) -> None:
        if slot is not None:
            self._copy(chunk, stretch, slot)
            self._free.put(slot)
        chunk.left -= 1
        if not chunk.left:
            chunk.finish()

    def _copy(self, chunk: Chunk, stretch: Stretch, slot: _Slot) -> None:
        assert slot.memory is not None, "something was read into it"
        memory, pairs, position = slot.memory.memory, [], 0
        # copies need none of autograd's bookkeeping
        with torch.inference_mode():
            # what was not read is not copied
            for target, begin, end in chunk.within(Stretch(stretch.begin, stretch.begin + stretch.reached)):
                pairs.append((target[begin:end], memory[position : position + end - begin]))
                position += end - begin
            # copies run one after another: the event of the last is that of all
            slot.event = chunk.copied = self._target.copy(pairs, chunk.ready)
            chunk.ready = None

    # in readers' threads

    def _run(self) -> None:
        try:
            self._target.enter_thread()
            # the slot comes first: the stretch that is needed next is always in the hands of a thread that has one
            while (slot := self._free.get()) is not None and (job := self._jobs.get()) is not None:
                if self._over():
                    return
                self._fill(*job, slot)
        except BaseException as error:
            self._error = error

    def _fill(self, chunk: Chunk, stretch: Stretch, slot: _Slot) -> None:
        if chunk.in_host_memory:
            self._free.put(slot)
            self._read(chunk, stretch, [target[begin:end] for target, begin, end in chunk.within(stretch)])
            self._fetched.put((chunk, stretch, None))
        else:
            self._read(chunk, stretch, [self._emptied(slot)[: stretch.end - stretch.begin]])
            self._fetched.put((chunk, stretch, slot))

    def _emptied(self, slot: _Slot) -> memoryview:
        """The slot's memory when nothing is copied from it any more."""
        if slot.buffer is None:
            slot.memory = self._target.slot(SLOT_BYTES)
            slot.buffer = slot.memory.memory.numpy().data
        # asking does not end the thread's turn, waiting does
        if slot.event is not None and not slot.event.query():
            slot.event.synchronize()
        return slot.buffer

    def _read(self, chunk: Chunk, stretch: Stretch, buffers: Sequence[memoryview]) -> None:
        started, size = time.monotonic(), stretch.end - stretch.begin
        try:
            file = self._files.get(chunk.file)
            while stretch.reached < size and not self._over():
                place = chunk.begin + stretch.begin + stretch.reached
                count = _read_at(file, _from(buffers, stretch.reached), place)
                if not count:
                    raise EOFError
                stretch.reached += count
        except (OSError, EOFError, _Changed) as error:
            # without its traceback, whose frames would hold the chunk and with it tensors
            stretch.error = error.with_traceback(None)
        self._adapt(time.monotonic() - started, size)

    def _adapt(self, seconds: float, size: int) -> None:
        if seconds > _SLOW_SECONDS:
            self.chunk_bytes = max(min(MIN_CHUNK_BYTES, CHUNK_BYTES), self.chunk_bytes // 2)
        elif seconds < _FAST_SECONDS and size >= min(self.chunk_bytes, SLOT_BYTES):
            self.chunk_bytes = min(CHUNK_BYTES, self.chunk_bytes * 2)


def _default_threads() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, max(_MIN_THREADS, usable - _OTHER_CORES))
