"""Running a temporal network piece by piece with the result of the whole pass.

A layer that looks along time keeps the frames it will need again in a ``Memory``. A whole pass is a stream of one
piece, so there is one code path for both. ``flow`` walks the layers depth first: a piece that has grown too large is
split again, and the finest activations of a clip never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..parallel.bands import WHOLE, Bands

# Pieces grow and shrink by the frames that layers hold back; cutting one that is a little too long would leave two short
# ones to all layers behind.
TOLERANCE = 1.5


class Memory:
    """The state of one stream: what the layers of a network remember of a clip, and pieces that wait for a layer.

    bands: which rows of the clip it has. waiting: (index of the next layer, piece, whether it is the last), the one to
    run next at the end.
    """

    def __init__(self, bands: Bands = WHOLE) -> None:
        self.bands = bands
        self.waiting: list[tuple[int, Tensor, bool]] = []
        self._frames: dict[nn.Module, Tensor] = {}
        self._started: set[nn.Module] = set()

    def take(self, layer: nn.Module) -> Tensor | None:
        """The frames that ``layer`` left here, or None before its first piece."""
        return self._frames.pop(layer, None)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        # cloned: a view would keep the whole piece alive
        self._frames[layer] = frames.clone()

    def first(self, layer: nn.Module) -> bool:
        """True once for every layer."""
        new = layer not in self._started
        self._started.add(layer)
        return new

    def delay(self, layer: nn.Module, x: Tensor, num_frames: int, last: bool) -> list[Tensor]:
        """Queue ``x`` [B, C, T, H, W] behind what ``layer`` still has here; return the queue's first frames.

        They come in parts, one after the other, as they lie in memory: putting them together would copy them all.
        """
        kept = self.take(layer)
        now, later = [], []
        for piece in [x] if kept is None else [kept, x]:
            count = min(num_frames, piece.shape[2])
            now.append(piece[:, :, :count])
            later.append(piece[:, :, count:])
            num_frames -= count
        if not last and any(piece.shape[2] for piece in later):
            self._frames[layer] = torch.cat(later, dim=2)
        return now

    def move(self, device: torch.device) -> None:
        """Move everything, to make room on a device while another clip or tile runs there."""
        self._frames = {layer: frames.to(device) for layer, frames in self._frames.items()}
        self.waiting = [(index, piece.to(device), last) for index, piece, last in self.waiting]


Layer = Callable[[Tensor, Memory, bool], Tensor]
"""(piece, memory, last) -> piece; may return zero frames while it waits for later ones."""


@dataclass(frozen=True, slots=True)
class Step:
    """One layer of a network.

    relative_size: elements of one input frame, or of what it becomes, relative to a frame of the finest stage.
    """

    run: Layer
    relative_size: float


def split(x: Tensor, max_frames: int) -> list[Tensor]:
    """Cut [B, C, T, H, W] along time into the fewest pieces of at most ``max_frames``, of nearly equal length."""
    return list(x.tensor_split(-(-x.shape[2] // max_frames), dim=2))


def with_last(pieces: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
    """Pair every piece with whether it is the last one."""
    return [(piece, index == len(pieces) - 1) for index, piece in enumerate(pieces)]


def flow(
    steps: Sequence[Step],
    x: Tensor,
    memory: Memory,
    last: bool,
    chunk_frames: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Run the piece ``x`` [B, C, T, H, W] through ``steps``; yield the results in order of time.

    last: whether ``x`` ends the clip, so that layers give out what they hold back.
    chunk_frames: length of a piece, counted in frames of the finest stage; one that is longer by more than half is cut.
    None: never. How many frames come out when depends on this and on the number of frames, not on the picture's size.
    check: called before every layer; may raise to stop.
    """
    memory.waiting.append((0, x, last))
    del x
    while memory.waiting:
        index, x, last = memory.waiting.pop()
        if index == len(steps):
            yield x
            continue
        step = steps[index]
        max_frames = x.shape[2] if chunk_frames is None else max(1, int(chunk_frames / step.relative_size))
        if x.shape[2] > TOLERANCE * max_frames:
            parts = with_last(split(x, max_frames))
            memory.waiting.extend((index, part, last and end) for part, end in reversed(parts))
            del parts
            continue
        check()
        x = step.run(x, memory, last)
        if x.shape[2]:
            memory.waiting.append((index + 1, x, last))
