"""Time and peak memory of the long parts of a job, said in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOG = logging.getLogger("ltx2.engine")


@contextmanager
def phase(name: str, device: torch.device) -> Iterator[None]:
    """Log how long the block took and, on a GPU, the most memory that tensors held during it.

    The block's last work must be finished when it ends (results copied to the CPU), or the time is the host's alone.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.init()  # the statistics of a device that nothing has used yet cannot be reset
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB" if on_gpu else ""
    _LOG.info("%s: %.2f s%s", name, seconds, peak)
