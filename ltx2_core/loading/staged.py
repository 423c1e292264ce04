"""Reading tensors at the speed of the device's link: threads read ahead while copies to the device run beside them.

Files are read, never mapped: a mapped file that is cut short while in use ends the process.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .arena import view
from .ring import Chunk, Landing, Readers, Request, Room, Target, target_of

__all__ = ["Request", "Room", "read_staged"]

log = logging.getLogger("ltx2.loading")

# what is worth a line in the log
_LOGGED_BYTES = 64 * 1024 * 1024
# of tensors that share a piece of memory
_ALIGNMENT = 16
# of what lies between the ends of such a piece in the file, at most; a device is asked for memory once for all of it
_PIECE_BYTES = 256 * 1024 * 1024

Allocate = Callable[[Request], Tensor | Room | None]
# a request, the memory that it was given, and where it lies in a piece that it shares
_Planned = tuple[Request, Tensor | Room | None, int | None]


def read_staged(
    requests: Iterable[Request],
    *,
    device: torch.device | str,
    allocate: Allocate | None = None,
    on_bytes: Callable[[int], None] | None = None,
    stopped: Callable[[], bool] | None = None,
    threads: int | None = None,
) -> Iterator[tuple[Request, Tensor]]:
    """Read tensors in the order of the requests, each as (request, tensor) on ``device``.

    A tensor has the file's dtype and shape; one of a type that torch lacks is uint8 [size in bytes]. It is ready for
    the stream that is current when the first one is asked for. Requests that follow one another in a file are read together.

    requests: taken one by one, at most ``ring.DEPTH`` chunks, and those that share a piece of memory with all between
    them, ahead of the tensor that is handed over.
    allocate: called with a request as it is taken; returns a contiguous tensor of its dtype and shape that the bytes go
    to, on ``device`` or in host memory, or a Room with one, or None for memory of their own.
    on_bytes: called with the number of bytes read since its last call, between two tensors. stopped: polled, from other
    threads too. threads: how many read; by default as many as there are cores but two, 4 to 16.

    Raises Interrupted when ``stopped`` returns True, CheckpointError in place of a tensor whose file cannot be read,
    ends early or was changed since its header was read, ValueError for unfit memory, and what requests, allocate and
    on_bytes raise. However the reading ends, exhausted, closed or by an error, it leaves no thread and no copy behind.
    """
    target = target_of(torch.device(device))
    readers = Readers(target, stopped or _never, threads)
    chunks = _plan(requests, readers, target, allocate or _none)
    flying: deque[Chunk] = deque()
    chunk: Chunk | None = None
    landing: Landing | None = None
    started, count, size = time.monotonic(), 0, 0
    target.begin()
    try:
        while True:
            while len(flying) < readers.depth and (chunk := next(chunks, None)) is not None:
                readers.submit(chunk)
                flying.append(chunk)
            if not flying:
                break
            chunk = flying.popleft()
            readers.wait(chunk)
            if on_bytes is not None and chunk.reached:
                on_bytes(chunk.reached)
            count, size = count + len(chunk.complete), size + chunk.reached
            target.hand_over(chunk.copied)
            while chunk.complete and chunk.complete[0][0] <= chunk.reached:
                _, landing = chunk.complete.popleft()
                yield landing.request, landing.tensor
            if chunk.error is not None:
                raise chunk.error
    finally:
        readers.close()
        # the frame lives on in the traceback of an error: it lets go of the tensors
        chunks.close()
        flying.clear()
        chunk = landing = None
    _log(count, size, time.monotonic() - started)


def _plan(
    requests: Iterable[Request], readers: Readers, target: Target, allocate: Allocate
) -> Generator[Chunk, None, None]:
    """The requests' bytes in chunks: adjacent tensors share one, a large tensor takes several."""
    chunk: Chunk | None = None
    for landing in _landings(requests, target, allocate):
        request = landing.request
        if chunk is not None and not chunk.continued_by(landing):
            yield chunk
            chunk = None
        offset, size = 0, request.info.size_bytes
        while True:
            if chunk is None:
                begin = request.info.begin + offset
                chunk = Chunk(request.file, begin, landing.in_host_memory, limit=readers.chunk_bytes)
            offset += chunk.add(landing, offset)
            if chunk.full:
                yield chunk
                chunk = None
            if offset == size:
                break
    if chunk is not None:
        yield chunk


def _landings(requests: Iterable[Request], target: Target, allocate: Allocate) -> Generator[Landing, None, None]:
    """Memory for every request, in their order; near neighbours of a file that may share it do."""
    run: list[_Planned] = []
    # bytes of the run in the file, and in its piece
    span = size = 0
    for request in requests:
        given, count = allocate(request), request.info.size_bytes
        if run and (request.file is not run[0][0].file or span + count > _PIECE_BYTES):
            yield from _of_run(run, size, target)
            run, span, size = [], 0, 0
        shares = given is None and request.shared
        if not run and not shares:
            yield _landing(request, given, target)
            continue
        run.append((request, given, size if shares else None))
        span += count
        if shares:
            size += -(-count // _ALIGNMENT) * _ALIGNMENT
    if run:
        yield from _of_run(run, size, target)


def _of_run(run: Sequence[_Planned], size: int, target: Target) -> Iterator[Landing]:
    """Landings of requests of which those that may share one piece of memory, whatever lies between them."""
    sharing = [(request.info, offset) for request, _, offset in run if offset is not None]
    with _normal():
        piece = target.empty((size,), torch.uint8)
        typed = {dtype: piece.view(dtype) for dtype in {info.torch_dtype for info, _ in sharing}}
        views = deque(view(typed[info.torch_dtype], info.torch_shape, offset) for info, offset in sharing)
    memory = _memory_of(piece, target.is_host_memory(piece))
    for request, given, offset in run:
        if offset is None:
            yield _landing(request, given, target)
        else:
            # taken out: a tensor is the consumer's alone once it is handed over
            yield Landing(request, views.popleft(), memory, offset)


def _landing(request: Request, given: Tensor | Room | None, target: Target) -> Landing:
    if isinstance(given, Room):
        _check_given(request, given.tensor, target)
        return Landing(
            request, given.tensor, _memory_of(given.memory, target.is_host_memory(given.memory)), given.offset
        )
    with _normal():
        if given is None:
            tensor = target.empty(request.info.torch_shape, request.info.torch_dtype)
        else:
            _check_given(request, given, target)
            tensor = given.detach()
        data = tensor.reshape(-1).view(torch.uint8)
    return Landing(request, tensor if given is None else given, _memory_of(data, target.is_host_memory(tensor)))


def _memory_of(data: Tensor, is_host_memory: bool) -> Any:
    """Flat bytes as a ``Landing`` has its target."""
    return data.numpy().data if is_host_memory else data


def _normal() -> contextlib.AbstractContextManager[None]:
    """Tensors are normal ones also where the caller infers: inference tensors cannot be updated in place later."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def _check_given(request: Request, given: Tensor, target: Target) -> None:
    wanted = request.info.torch_dtype, request.info.torch_shape, True
    found = given.dtype, tuple(given.shape), given.is_contiguous()
    if found != wanted or given.device not in (target.device, torch.device("cpu")):
        raise ValueError(
            f"{request.info.name!r} is {wanted[0]} {list(wanted[1])} for {target.device}; it was given memory of "
            f"{found[0]} {list(found[1])} on {given.device}, {'contiguous' if found[2] else 'not contiguous'}"
        )


def _log(count: int, size: int, seconds: float) -> None:
    level = logging.INFO if size >= _LOGGED_BYTES else logging.DEBUG
    speed = size / max(seconds, 1e-9) / 1e9
    log.log(level, "read %d tensors, %.2f GB in %.2f s (%.1f GB/s)", count, size / 1e9, seconds, speed)


def _never() -> bool:
    return False


def _none(request: Request) -> None:
    return None
