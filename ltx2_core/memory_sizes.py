"""The sizes from which a run's memory is planned: what it needs, and what there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from .sampling_memory import WorkBytes
from .shapes import ClipShape
from .vae.tiling import TilePlan

# kept free for what PyTorch does not count: kernels that are loaded late, other programs
RESERVE_BYTES = 1 << 30
HOST_RESERVE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Stack:
    """Sizes of a network of like blocks. outside: bytes of what is no block. block: bytes of the largest one."""

    outside: int
    block: int
    num_blocks: int

    @property
    def total(self) -> int:
        return self.outside + self.num_blocks * self.block

    def packed(self, share: float) -> Stack:
        """The same network from a file whose blocks take this share."""
        return replace(self, block=int(self.block * share))

    def streamed(self, slots: int) -> int:
        """Bytes on the device when every block is streamed."""
        return self.outside + slots * self.block


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a run needs.

    text_head: bytes of the projection and connectors. decoders: bytes of the video and audio decoders and the vocoder.
    encoding_work: of the text encoder. sampling, decoding: the work for a clip; decoding also depends on the free memory.
    transformer_bits, text_bits: of a weight, as the network holds it.
    """

    transformer: Stack
    text_encoder: Stack
    text_head: int
    decoders: int
    clip: ClipShape
    encoding_work: int
    sampling: Callable[[ClipShape], WorkBytes]
    decoding: Callable[[ClipShape, int], TilePlan]
    transformer_bits: float = 16.0
    text_bits: float = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What there is.

    free: bytes of the device that the model may use, what it holds already included. budget: the most that the user
    allows, the reserve included; None for all that is free. host_free: bytes of host memory. others: further devices and
    their free bytes.
    """

    device: str
    free: int
    host_free: int
    budget: int | None = None
    others: Mapping[str, int] = field(default_factory=dict)

    @property
    def usable(self) -> int:
        return min(self.free, self.free if self.budget is None else self.budget) - RESERVE_BYTES


def gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def size(count: int) -> str:
    return f"{gib(count)} GiB"
