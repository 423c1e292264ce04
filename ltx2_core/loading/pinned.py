"""Host memory that a GPU can copy from and to at the full speed of its link."""

from __future__ import annotations

import contextlib
import functools
import logging
import mmap
import sys
import weakref

import torch
from torch import Tensor

log = logging.getLogger("ltx2.loading")

_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable


class PinnedMemory:
    """So many bytes of host memory, pinned where there is a GPU; ``memory`` is flat uint8, not initialised.

    PyTorch's own pinned memory would be rounded up to a power of two.
    """

    def __init__(self, count: int):
        self.memory = pages(count)
        self.pinned = _pin(self.memory)
        self._unpin = weakref.finalize(self, _unpin, self.memory) if self.pinned else None
        if self._unpin is not None:
            self._unpin.atexit = False  # the process takes its pages with it

    def close(self) -> None:
        """Unpin, when no copy is under way; the memory goes with the last tensor that lies in it."""
        if self._unpin is not None:
            self._unpin()
        self.pinned = False


def pages(count: int) -> Tensor:
    """Flat uint8 host memory of at least that size in pages of its own, not initialised; large ones where the system has them: those are pinned much faster."""
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    whole = max(-(-count // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.PAGESIZE)
    region = mmap.mmap(-1, whole, **private)
    with contextlib.suppress(AttributeError, OSError):
        region.madvise(mmap.MADV_HUGEPAGE)
    # a normal tensor, which may be written inside and outside of inference mode
    with torch.inference_mode(False):
        return torch.frombuffer(region, dtype=torch.uint8)


def _pin(memory: Tensor) -> bool:
    if not torch.cuda.is_available():
        return False
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _FOR_ALL_DEVICES))
    if code != 0:
        # the runtime keeps the error for whoever launches the next kernel
        with contextlib.suppress(RuntimeError, AssertionError):
            torch.ones(1, device="cuda")
        _warn_pageable(code)
    return code == 0


def _unpin(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


@functools.cache
def _warn_pageable(code: int) -> None:
    log.warning(
        "host memory cannot be pinned (CUDA error %d): weights are copied from pageable memory, about half as fast. In a "
        "container, raise its limit of locked memory (ulimit -l)",
        code,
    )
