"""Host memory that a GPU can copy from and to at the full speed of its link."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref

import torch
from torch import Tensor

log = logging.getLogger("ltx2.loading")

# pages are pinned whole, so pinned memory shares none with other memory
_PAGE = 4096
_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable


class PinnedMemory:
    """A piece of host memory of exactly that many bytes, pinned where there is a GPU; flat uint8, not initialised.

    PyTorch's own pinned memory would be rounded up to a power of two.
    """

    def __init__(self, count: int):
        whole = -(-count // _PAGE) * _PAGE
        memory = torch.empty(whole + _PAGE, dtype=torch.uint8)
        start = -memory.data_ptr() % _PAGE
        self.memory = memory[start : start + whole][:count]
        self.pinned = _pin(self.memory)
        self._unpin = weakref.finalize(self, _unpin, self.memory) if self.pinned else None
        if self._unpin is not None:
            self._unpin.atexit = False  # the process takes its pages with it

    def close(self) -> None:
        """Unpin, when no copy is under way; the memory goes with the last tensor that lies in it."""
        if self._unpin is not None:
            self._unpin()
        self.pinned = False


def _pin(memory: Tensor) -> bool:
    if not torch.cuda.is_available() or memory.nbytes == 0:
        return False
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _FOR_ALL_DEVICES))
    if code != 0:
        # the runtime keeps the error for whoever launches the next kernel
        with contextlib.suppress(RuntimeError):
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
