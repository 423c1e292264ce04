"""Blocks through torch.compile, for who wants it: what is left between fused kernels and matrix products is joined too."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .attend import for_all

log = logging.getLogger("ltx2.engine")

# "1" in the environment
SWITCH = "LTX2_COMPILE"


def wants_compiling() -> bool:
    """Whether the user asked for it."""
    return os.environ.get(SWITCH) == "1"


@contextlib.contextmanager
def compiled(blocks: Iterable[nn.Module], **options: Any) -> Iterator[None]:
    """Inside the block, these modules run compiled, one graph for all that are alike and for one set of shapes.

    Fused kernels are operators that the compiler leaves alone. Weights and hooks must stay as they are: not for blocks that
    are streamed. The first evaluation of a shape waits for the compiler, a minute or so. options: of ``torch.compile``.
    """
    blocks = list(blocks)
    # rounds between operations as they do one by one
    options = {"fullgraph": True, "dynamic": False, "options": {"emulate_precision_casts": True}} | options
    for block in blocks:
        block.compile(**options)
    log.info("compile: %d blocks through torch.compile", len(blocks))
    try:
        with for_all():
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
