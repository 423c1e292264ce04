"""A meeting of processes on their GPUs: each tells the others that it has come, and goes on when all have.

Words are numbers in memory that the processes have opened of each other. A word counts the meetings of its writer, so one that
is read late is not missed. Whatever a process has copied to another before a meeting, in the order of its streams, is there
behind it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def meet_kernel(p_count, p_words, p_others, own, SIZE: tl.constexpr):
    count = tl.load(p_count) + 1
    for rank in tl.static_range(SIZE):
        if rank != own:
            p_word = tl.load(p_others + rank).to(tl.pointer_type(tl.int32)) + own
            tl.atomic_xchg(p_word, count, sem="release", scope="sys")
    for rank in tl.static_range(SIZE):
        if rank != own:
            seen = tl.atomic_add(p_words + rank, 0, sem="acquire", scope="sys")
            while seen < count:
                seen = tl.atomic_add(p_words + rank, 0, sem="acquire", scope="sys")
    tl.store(p_count, count)


def meet(count: Tensor, words: Tensor, others: Tensor, own: int) -> None:
    """Tell the others of this meeting and wait for theirs, on the current stream.

    count: [1] int32, meetings so far. words: [P] int32 in memory that the others write to, where word r is of rank r. others:
    [P] int64, where the words of every rank are for this process. own: this rank. All of them meet equally often.
    """
    with torch.cuda.device(count.device):
        meet_kernel[(1,)](count, words, others, own, SIZE=len(words), num_warps=1)
