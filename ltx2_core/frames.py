"""Decoded pixels become frames in host memory while the device decodes the next ones."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .loading.pinned import PinnedMemory
from .loading.ring import CHUNK_BYTES, Target

_SLOTS = 3
_POLL_SECONDS = 0.002


def deliver(
    pieces: Iterable[Tensor],
    frames: Tensor,
    device: torch.device,
    on_frames: Callable[[int], None] = lambda done: None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write decoded pieces to their places among the frames of a clip.

    pieces: pixels [B, 3, f, H, W] on ``device``, nominally in -1..1, in order of time; their memory is reused.
    frames: [B, F, H, W, 3] in host memory, shared or not; float32 gets 0..1, uint8 0..255. It may be a band of rows of
    larger frames: whole rows, and those of a frame lie end to end. on_frames: called with the number of frames that
    have arrived. check: polled while the device computes. Both may raise to stop.
    """
    places = _with_places(pieces, frames)
    arrivals = _beside(places, device, check) if device.type == "cuda" else _at_once(places)
    done = 0
    with contextlib.closing(arrivals):
        for count in arrivals:
            done += count
            on_frames(done)
    assert done == frames.shape[1], f"decoded {done} of {frames.shape[1]} frames"


def write_frames(pixels: Tensor, out: Tensor) -> None:
    """Write pixels [B, 3, f, H, W], nominally in -1..1, to ``out`` [B, f, H, W, 3]; ``pixels`` is clamped.

    float32 gets 0..1, with the bits of ``((pixels.float() + 1) / 2).clamp(0, 1)``, in two passes: halves and clamping
    are exact. uint8 gets the nearest of 0..255 to that, and 0 for NaN.
    """
    if out.dtype == torch.uint8:
        exact = torch.empty(out.shape, device=out.device)
        write_frames(pixels, exact)
        out.copy_(exact.nan_to_num_(0).mul_(255).round_())
        return
    half = out.new_full((1,), 0.5)
    torch.add(half, pixels.clamp_(-1, 1).permute(0, 2, 3, 4, 1), alpha=0.5, out=out)


def _with_places(pieces: Iterable[Tensor], frames: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    begin = 0
    for pixels in pieces:
        end = begin + pixels.shape[2]
        yield pixels, frames[:, begin:end]
        # else it would live until the next piece is decoded
        del pixels
        begin = end


def _at_once(places: Iterable[tuple[Tensor, Tensor]]) -> Generator[int, None, None]:
    for pixels, place in places:
        write_frames(pixels, place)
        yield place.shape[1]


def _beside(
    places: Iterable[tuple[Tensor, Tensor]], device: torch.device, check: Callable[[], None]
) -> Generator[int, None, None]:
    """A piece is fetched when the next one has been asked for, so the device always has work."""
    before: _Pictures | None = None
    with _Link(device) as link:
        for pixels, place in places:
            now = _Pictures.of(pixels, place)
            del pixels
            if before is not None:
                yield link.fetch(before, check)
            before = now
            del now
        if before is not None:
            yield link.fetch(before, check)


@dataclass(frozen=True)
class _Pictures:
    """Frames [B, f, H, W, 3] on a device, complete after an event, and where they belong."""

    frames: Tensor
    place: Tensor
    complete: torch.cuda.Event

    @classmethod
    def of(cls, pixels: Tensor, place: Tensor) -> _Pictures:
        frames = torch.empty(place.shape, dtype=place.dtype, device=pixels.device)
        write_frames(pixels, frames)
        return cls(frames, place, torch.cuda.current_stream(pixels.device).record_event())


class _Link:
    """Copies from a device to any host memory, through a few pinned slots and on a stream of its own."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._memory = Target(device)
        self._slots: list[PinnedMemory] = []

    def __enter__(self) -> _Link:
        self._slots = [self._memory.slot(CHUNK_BYTES) for _ in range(_SLOTS)]
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.synchronize()
        self._memory.give_back(self._slots)

    def fetch(self, pictures: _Pictures, check: Callable[[], None]) -> int:
        """Wait for pictures and copy them to their place; returns how many frames they are."""
        while not pictures.complete.query():
            check()
            time.sleep(_POLL_SECONDS)
        for source, place in zip(pictures.frames, pictures.place, strict=True):
            self._copy(source, place)
        return pictures.place.shape[1]

    def _copy(self, source: Tensor, place: Tensor) -> None:
        """Copy frames [f, H, W, 3]. The source was complete before, so the stream has nothing to wait for."""
        under_way: deque[tuple[torch.cuda.Event, Tensor, Tensor]] = deque()
        for number, (part, target) in enumerate(_parts(source, place, CHUNK_BYTES // source.itemsize)):
            if len(under_way) == _SLOTS:
                _land(*under_way.popleft())
            slot = self._slots[number % _SLOTS].memory[: part.nbytes].view(part.dtype).view(part.shape)
            with torch.cuda.stream(self._stream):
                slot.copy_(part, non_blocking=True)
            under_way.append((self._stream.record_event(), slot, target))
        while under_way:
            _land(*under_way.popleft())


def _parts(source: Tensor, place: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a contiguous tensor and its place alike, into parts of at most ``most`` elements."""
    if place.is_contiguous():
        yield from zip(source.view(-1).split(most), place.view(-1).split(most), strict=True)
        return
    # bands of frames: rows of the frames between them are not theirs
    frames = most // source[0].numel()
    if frames:
        yield from zip(source.split(frames), place.split(frames), strict=True)
        return
    for one, its_place in zip(source, place, strict=True):
        yield from _parts(one, its_place, most)


def _land(copied: torch.cuda.Event, slot: Tensor, target: Tensor) -> None:
    copied.synchronize()
    # one thread is several times as fast as pixels are decoded; those of PyTorch, of every rank, would take turns for cores
    np.copyto(target.numpy(), slot.numpy())
