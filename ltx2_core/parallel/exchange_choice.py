"""In which way the tokens of one group of ranks are exchanged: through NCCL, or by copy engines beside the computing.

Copy engines are used where GPUs reach each other's memory, what arrives has the bits that NCCL brings, and an exchange beside
matrix products takes the slowest rank less time. That is tried once, when a group begins, and so is whether they should have
rows packed.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from .context import ParallelContext, Split
from .peer_copies import PeerCopies

log = logging.getLogger("ltx2.engine")

# "off" in the environment: NCCL exchanges everything
SWITCH = "LTX2_COPY_ENGINES"

_REPEATS = 5
# of queries, in bfloat16: what a clip of 768x1280 has on each of two ranks
_TOKENS, _WIDTH = 15360, 4096
_PRODUCTS = 6
_PLACES = ("queries", "keys", "values")
_NCCL = "through NCCL"
# whether rows are packed
_ENGINES = {"by copy engines": False, "by copy engines, packed": True}


def fastest_exchange(context: ParallelContext, device: torch.device) -> ParallelContext:
    """The context with copy engines where these are right and faster. All of its ranks call it together."""
    if context.size == 1 or device.type != "cuda" or os.environ.get(SWITCH) == "off":
        return context
    if not context.agree(_has_kernels(), device):
        log.info("exchange: through NCCL alone, copy engines need Triton")
        return context
    copies = PeerCopies(context.rank, context.exchange, device)
    copied = replace(context, copies=copies)
    times = {}
    for way, packs in _ENGINES.items():
        copies.packs = packs
        if not _alike(context, copied, device):
            copies.close()
            return context
        times[way] = _milliseconds(copied, device)
    times[_NCCL] = _milliseconds(context, device)
    chosen = _fastest(times, context, device)
    if chosen == _NCCL:
        copies.close()
        return context
    copies.packs = _ENGINES[chosen]
    return copied


def _has_kernels() -> bool:
    try:
        from ...kernels import meet_triton  # noqa: F401
    except ImportError:
        return False
    return True


def _alike(one: ParallelContext, other: ParallelContext, device: torch.device) -> bool:
    """Whether copies are there and both give the same bits on all ranks, for tokens that the ranks cannot share evenly."""
    split, copied = (Split(context, 1024 * one.size + 1) for context in (one, other))
    x = torch.randn(3, 1, split.share, 128 * one.size, device=device)
    assert copied.context.copies is not None
    if not copied.context.copies.carries(x[0], copied):
        return False
    same = []
    for _ in range(_REPEATS):
        x = x.roll(1, 0) + 1
        wanted = split.to_heads(*x)
        got = copied.to_heads(*(copied.ahead(place, part) for place, part in zip(_PLACES, x, strict=True)))
        same += [torch.equal(a, b) for a, b in zip(got, wanted, strict=True)]
        back, results = copied.to_tokens(wanted[0]), split.to_tokens(wanted[0])
        same.append(torch.equal(back, results))
    if one.agree(all(same), device):
        return True
    log.warning("exchange: through NCCL, what copy engines bring is not the same")
    return False


def _fastest(times: dict[str, float], context: ParallelContext, device: torch.device) -> str:
    """The way in which the slowest rank takes the least time, which all find alike; the log has this one's milliseconds."""
    mine = torch.tensor(list(times.values()), device=device)
    chosen = list(times)[int(context.exchange.all_gather(mine).amax(0).argmin())]
    log.info("exchange: %s; beside matrices %s", chosen, ", ".join(f"{way} {ms:.2f} ms" for way, ms in times.items()))
    return chosen


def _milliseconds(context: ParallelContext, device: torch.device) -> float:
    """Of matrix products with an exchange of values begun before them, and then of queries and keys."""
    split = Split(context, _TOKENS)
    q, k, v = torch.randn(3, 1, split.share, _WIDTH, device=device, dtype=torch.bfloat16)
    matrix = torch.randn(_WIDTH, _WIDTH, device=device, dtype=torch.bfloat16)

    def run() -> None:
        going = split.ahead("values", v)
        for _ in range(_PRODUCTS):
            torch.mm(q[0], matrix)
        split.to_tokens(split.to_heads(split.ahead("queries", q), split.ahead("keys", k), going)[0])

    return statistics.median(_timed(run, context, device) for _ in range(_REPEATS))


def _timed(run: Callable[[], None], context: ParallelContext, device: torch.device) -> float:
    # all ranks begin at once
    context.agree(True, device)
    begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record(torch.cuda.current_stream(device))
    run()
    done.record(torch.cuda.current_stream(device))
    done.synchronize()
    return begun.elapsed_time(done)
