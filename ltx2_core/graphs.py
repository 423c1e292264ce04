"""An evaluation of the transformer as CUDA graphs: what the host does for it, it does once a run.

A forward is some 4,500 launches, which take a host as long as a GPU takes for a short clip. Captured, they are a few dozen
graphs of a few blocks each, cut so that a Stop is heard between them, and the sound computes beside the picture.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .av import AV
from .parallel.context import SINGLE, ParallelContext
from .transformer.lanes import ONE_LANE, Lanes, TwoLanes

log = logging.getLogger("ltx2.engine")

# "off" in the environment: every launch is issued by itself
SWITCH = "LTX2_GRAPHS"
# Capturing takes the host about as long as one evaluation, which is more than it saves in a few of them.
WORTH_CAPTURING = 6
# At 1088x1920 two blocks are a tenth of a second of an H200.
_BLOCKS_A_GRAPH = 2
# Graphs that wait on the device beside the one that runs: enough that it never runs dry, few enough for a quick stop.
_AHEAD = 2
_NAP_SECONDS = 0.0005

# (tokens of each stream, noise level, which streams are updated, before every block, lanes) -> the velocity of every pass
Run = Callable[[AV[Tensor], "float | Tensor", AV[bool], Callable[[], None], Lanes], list[AV[Tensor]]]


def can_capture(device: torch.device) -> bool:
    """Whether graphs can be used on the device, and are wanted; where not on a GPU, the log says why."""
    return device.type == "cuda" and os.environ.get(SWITCH) != "off" and _allocator_can()


@functools.cache
def _allocator_can() -> bool:
    """Whether PyTorch's allocator has pools for graphs, said once where it has none."""
    if not hasattr(torch.cuda, "MemPool"):
        log.info("graphs: not with PyTorch %s, they need 2.6", torch.__version__)
        return False
    backend = torch.cuda.get_allocator_backend()
    if backend != "native":
        log.info(
            "graphs: not with the memory allocator %s. Short clips are faster with PyTorch's own: start ComfyUI with "
            "--disable-cuda-malloc, or leave backend:%s out of PYTORCH_CUDA_ALLOC_CONF",
            backend,
            backend,
        )
    return backend == "native"


class Graphs:
    """An evaluation that is run once as it is, captured behind that while the device still works, and replayed from then on.

    What it returns is overwritten by the next call. Everything but tokens, noise level and the streams that are updated
    must stay where it is as long as this object is used: weights, prompts, tables. One thread at a time.
    """

    def __init__(self, run: Run, check: Callable[[], None], device: torch.device, parallel: ParallelContext = SINGLE):
        """check: called often, and by ranks that share tokens (``parallel``) equally often; may raise to stop.

        What such ranks exchange is captured too: all of them capture, or none does.
        """
        self._run, self._check, self._device, self._parallel = run, check, device, parallel
        self._stream, self._sound = _streams(device)
        # what runs by itself and what is captured take turns in the same memory
        self._pool = torch.cuda.MemPool()
        self._captured: dict[AV[bool], _Captured | None] = {}

    def __del__(self) -> None:
        # a pool that goes while graphs hold it leaves its memory to PyTorch, which keeps that until it runs short
        vars(self).pop("_captured", None)

    def __call__(self, x: AV[Tensor], sigma: float, enabled: AV[bool]) -> list[AV[Tensor]]:
        around = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(around)
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                captured = self._captured.get(enabled)
                if captured is not None:
                    return captured.replay(x, sigma, self._check, alone=self._parallel.size == 1)
                with torch.cuda.use_mem_pool(self._pool):
                    velocities = self._run(x, sigma, enabled, self._check, ONE_LANE)
                if enabled not in self._captured:
                    self._captured[enabled] = self._capture(x, enabled)
                return velocities
        finally:
            around.wait_stream(self._stream)

    def _capture(self, x: AV[Tensor], enabled: AV[bool]) -> _Captured | None:
        """The evaluation as graphs, or None where that does not work, which is said in the log."""
        began = time.perf_counter()
        # ranks that may fail here one by one must not wait for each other at a gate
        check = self._check if self._parallel.size == 1 else _nothing
        try:
            captured = _Captured(self._run, x, enabled, check, TwoLanes(self._sound), self._pool.id)
        except BaseException as error:
            # a pool whose graphs have all gone takes no more of them
            self._pool = torch.cuda.MemPool()
            if not isinstance(error, RuntimeError):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("graphs: not used, this evaluation cannot be captured: %s", reason[0])
            captured = None
        if not self._parallel.agree(captured is not None, self._device):
            return None
        assert captured is not None
        log.info("graphs: %d captured in %.2f s", captured.count, time.perf_counter() - began)
        return captured


class _Captured:
    """The graphs of one evaluation, what they read and what they write."""

    def __init__(
        self, run: Run, x: AV[Tensor], enabled: AV[bool], check: Callable[[], None], lanes: TwoLanes, pool: Any
    ):
        device = next(x.present()).device
        self._x: AV[Tensor] = x.map(torch.empty_like)
        # the multiplication by a number on the host rounds it to float32 as well
        self._sigma = torch.zeros((), dtype=torch.float32, device=device)
        self._ahead = RunAhead(_AHEAD, lambda: torch.cuda.current_stream(device).record_event())
        with Recording(functools.partial(_Graph, pool, lanes), _BLOCKS_A_GRAPH, check) as recording:
            self._velocities = run(self._x, self._sigma, enabled, recording.on_block, lanes)
        self._graphs = recording.graphs

    @property
    def count(self) -> int:
        return len(self._graphs)

    def replay(self, x: AV[Tensor], sigma: float, check: Callable[[], None], *, alone: bool) -> list[AV[Tensor]]:
        """alone: ``check`` may be called any number of times, while the device is waited for too."""
        self._x.map(lambda ours, given: ours.copy_(given), x)
        self._sigma.fill_(sigma)
        for graph in self._graphs:
            if not alone:
                check()
            self._ahead.wait(check if alone else _nothing)
            graph.replay()
            self._ahead.enqueued()
        return self._velocities


class _Graph:
    """One graph while it is captured on the current stream, and behind that."""

    def __init__(self, pool: Any, lanes: TwoLanes):
        self._graph, self._lanes, self._pool = torch.cuda.CUDAGraph(), lanes, pool
        # other threads go on reading files and allocating memory
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        lanes.part()

    def end(self) -> None:
        self._lanes.join()
        self._graph.capture_end()

    def drop(self) -> None:
        """End the capture of something that failed."""
        with contextlib.suppress(RuntimeError):
            # what is stopped, but not broken, ends like any other
            self._lanes.join()
        try:
            self._graph.capture_end()
        except RuntimeError:
            # the device has ended it, but PyTorch would go on allocating for it
            device = torch.cuda.current_device()
            for give_back in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                with contextlib.suppress(RuntimeError, AttributeError):
                    getattr(torch._C, give_back)(device, self._pool)

    def replay(self) -> None:
        self._graph.replay()


class Recording:
    """A context manager inside which an evaluation is captured, ``blocks`` blocks a graph.

    begin: starts to capture and returns an object with ``end`` and ``drop``. check: may raise to stop.
    """

    def __init__(self, begin: Callable[[], Any], blocks: int, check: Callable[[], None]):
        self._begin, self._blocks, self._check = begin, blocks, check
        self._count = 0
        self._open: Any = None
        self.graphs: list[Any] = []

    def __enter__(self) -> Recording:
        self._open = self._begin()
        return self

    def on_block(self) -> None:
        """Before every block: a new graph for every so many."""
        self._check()
        if self._count and self._count % self._blocks == 0:
            self._close()
            self._open = self._begin()
        self._count += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._close()
        elif self._open is not None:
            self._open.drop()

    def _close(self) -> None:
        graph, self._open = self._open, None
        graph.end()
        self.graphs.append(graph)


class RunAhead:
    """Lets the host be only so many pieces of work ahead of the device, so that it can stop it and knows how far it is."""

    def __init__(self, most: int, record: Callable[[], Any]):
        """record: returns an event that has happened (``query()``) when what was enqueued before is done."""
        self._most, self._record = most, record
        self._events: deque[Any] = deque()

    def enqueued(self) -> None:
        """A piece of work was enqueued."""
        self._events.append(self._record())

    def wait(self, check: Callable[[], None]) -> None:
        """Return when another piece may be enqueued. ``check`` is called meanwhile and may raise."""
        check()
        while len(self._events) > self._most:
            if self._events[0].query():
                self._events.popleft()
                continue
            time.sleep(_NAP_SECONDS)
            check()


def _nothing() -> None:
    pass


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams of all graphs on the device, for the picture and for the sound, for good: libraries keep memory for
    every stream that they have worked on."""
    with torch.cuda.device(device):
        streams = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
        for stream in streams:
            with torch.cuda.stream(stream):
                # that memory does not belong to a run
                some = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
                torch.addmm(some[0], some, some)
    return streams
