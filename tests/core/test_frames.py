"""Pixels on their way to frames in host memory, at once and beside the decoding, with a stand-in for the device."""

from __future__ import annotations

import contextlib

import pytest
import torch
from ltx2_engine.ltx2_core import frames as module
from ltx2_engine.ltx2_core.frames import deliver, write_frames

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pixels(dtype: torch.dtype, frames: int, batch: int = 1, height: int = 6, width: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, 3, frames, height, width, generator=generator).to(dtype)


def plain(x: torch.Tensor) -> torch.Tensor:
    return ((x.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_have_the_bits_of_the_plain_formula(dtype: torch.dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    edges = torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-40, -1e-40, 1 - 2**-24, -1 + 2**-24, 1 + 2**-23]).float()
    x = torch.cat((every.float(), edges, torch.randn(2**14))).to(dtype)
    x = x[: len(x) // 3 * 3].view(1, 3, 1, 1, -1)
    out = torch.empty(plain(x).shape)
    want = plain(x)
    write_frames(x.clone(), out)
    # bit for bit, NaN included
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.nan_to_num(2), want.nan_to_num(2))


class Queue:
    """Stands in for CUDA: an event is complete after it was asked for three times."""

    def __init__(self):
        self.log, self.unfinished = [], 0

    def install(self, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
        queue = self

        class Event:
            def __init__(self):
                self.asked = 0

            def query(self) -> bool:
                self.asked += 1
                return self.asked > 3

            def synchronize(self) -> None:
                queue.unfinished -= 1

        class Stream:
            def record_event(self) -> Event:
                queue.unfinished += 1
                return Event()

            def synchronize(self) -> None:
                queue.log.append("end")

        class Current:
            def record_event(self) -> Event:
                queue.log.append("piece")
                return Event()

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current())
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    queue.install(monkeypatch, 1024)
    return queue


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("lengths", [(1,), (5, 1, 3), (2, 2, 2, 2)])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_pieces_arrive_in_order_in_their_places(queue: Queue, batch: int, lengths: tuple[int, ...], device):
    clip = pixels(torch.bfloat16, sum(lengths), batch)
    frames, seen = torch.full((batch, sum(lengths), 6, 10, 3), float("nan")), []
    deliver((piece.clone() for piece in clip.split(lengths, dim=2)), frames, device, seen.append)
    assert torch.equal(frames, plain(clip))
    assert seen == [sum(lengths[: i + 1]) for i in range(len(lengths))]
    assert queue.unfinished == 0


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("chunk_bytes", [300, 1500, 10**6])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_band_arrives_in_its_rows_of_larger_frames(monkeypatch, batch: int, chunk_bytes: int, device):
    """In parts of a frame, of one frame, of several."""
    queue = Queue()
    queue.install(monkeypatch, chunk_bytes)
    clip = pixels(torch.bfloat16, 8, batch)
    frames = torch.full((batch, 8, 16, 10, 3), 2.0)
    deliver((piece.clone() for piece in clip.split((5, 1, 2), dim=2)), frames[:, :, 4:10], device)
    assert torch.equal(frames[:, :, 4:10], plain(clip))
    assert (frames[:, :, :4] == 2).all()
    assert (frames[:, :, 10:] == 2).all()
    assert queue.unfinished == 0


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_band_without_rows_arrives_too(queue: Queue, device):
    seen, frames = [], torch.full((1, 3, 16, 10, 3), 2.0)
    deliver([pixels(torch.bfloat16, 3, height=0)], frames[:, :, 16:], device, seen.append)
    assert seen == [3]
    assert (frames == 2).all()


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_frames_may_have_eight_bits(queue: Queue, device):
    clip = pixels(torch.bfloat16, 2)
    clip[0, 0, 0, 0, 0] = float("nan")
    frames = torch.full((1, 2, 6, 10, 3), 7, dtype=torch.uint8)
    deliver([clip.clone()], frames, device)
    want = plain(clip).nan_to_num(0).mul(255).round().to(torch.uint8)
    assert torch.equal(frames, want), "those of pictures that are written to files"


def test_a_piece_is_fetched_when_the_next_has_been_asked_for(queue: Queue):
    made = []

    def pieces():
        for number in range(4):
            made.append(number)
            yield pixels(torch.float32, 1)

    arrived = []
    deliver(pieces(), torch.empty(1, 4, 6, 10, 3), CUDA, lambda done: arrived.append((done, len(made))))
    assert arrived == [(1, 2), (2, 3), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("device", "where"), [(CPU, "on_frames"), (CPU, "pieces"), (CUDA, "check"), (CUDA, "on_frames"), (CUDA, "pieces")]
)
def test_what_stops_a_delivery_comes_through_and_ends_it(queue: Queue, device, where: str):
    closed = []

    def fail(*_):
        raise InterruptedError

    def pieces():
        try:
            yield pixels(torch.float32, 1)
            if where == "pieces":
                fail()
            yield pixels(torch.float32, 1)
            yield pixels(torch.float32, 1)
        finally:
            closed.append(True)

    options = {} if where == "pieces" else {where: fail}
    stream = pieces()
    with pytest.raises(InterruptedError):
        deliver(stream, torch.empty(1, 3, 6, 10, 3), device, **options)
    assert queue.log[-1:] == (["end"] if device is CUDA else [])
    stream.close()
    assert closed
    assert queue.unfinished == 0


def test_pieces_that_do_not_fill_the_clip_are_noticed():
    with pytest.raises(AssertionError, match="decoded 1 of 2 frames"):
        deliver([pixels(torch.float32, 1)], torch.empty(1, 2, 6, 10, 3), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_device_gives_the_same_frames_without_waiting_in_between(batch: int):
    clip = pixels(torch.bfloat16, 24, batch, 256, 384)
    frames = torch.empty(batch, 24, 256, 384, 3)
    on_device = clip.cuda()
    deliver((piece.clone() for piece in on_device.split(5, dim=2)), frames, CUDA)
    assert torch.equal(frames, plain(clip))
