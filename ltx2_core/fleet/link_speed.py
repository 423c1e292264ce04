"""How fast the ranks of a host exchange tensors, measured once a generation of workers."""

from __future__ import annotations

import time

import torch

from ..parallel.context import ParallelContext

_BYTES = 64 << 20


def measured_link_speed(parallel: ParallelContext, device: torch.device) -> float:
    """Bytes a second that this rank sends to the others while all send to all."""
    x = torch.empty(parallel.size, _BYTES // parallel.size, dtype=torch.uint8, device=device)
    # the first exchange sets up the connections
    for _ in range(2):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        parallel.exchange.all_to_all(x)
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return x.nbytes * (parallel.size - 1) / parallel.size / seconds
