"""Where copy engines put rows: ranks in threads, with host memory for that of GPUs and copies that are done at once."""

import contextlib
import ctypes
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from ltx2_engine.kernels import meet_triton
from ltx2_engine.ltx2_core.parallel import device_memory, peer_copies
from ltx2_engine.ltx2_core.parallel.context import ParallelContext, Split
from ltx2_engine.ltx2_core.parallel.device_memory import HANDLE_BYTES

CPU = torch.device("cpu")


class HostMemory:
    """``OwnMemory`` on the host, whose handle is its address."""

    def __init__(self, nbytes, device):
        # what nobody writes is seen
        self.bytes = torch.full((nbytes,), 0x7F, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()

    def handle(self):
        return self.address.to_bytes(8, "little").ljust(HANDLE_BYTES, b"\0")

    def free(self):
        pass


class Together:
    """Collectives of ranks that are threads."""

    def __init__(self, size):
        self.barrier, self.given = threading.Barrier(size, timeout=20), [None] * size

    def of(self, rank):
        def exchange(x, pick):
            self.given[rank] = x.clone()
            self.barrier.wait()
            found = pick(self.given)
            self.barrier.wait()
            return found

        return types.SimpleNamespace(
            all_gather=lambda x: exchange(x, torch.stack),
            all_to_all=lambda x: exchange(x, lambda given: torch.stack([one[rank] for one in given])),
        )


def copy_now(name, copy, stream):
    """The driver's copy, with what it demands."""
    assert name == "cuMemcpy2DAsync_v2"
    copy = copy._obj
    assert min(copy.from_pitch, copy.to_pitch) >= copy.width > 0
    for row in range(copy.height):
        ctypes.memmove(copy.to_device + row * copy.to_pitch, copy.from_device + row * copy.from_pitch, copy.width)


@pytest.fixture
def host(monkeypatch):
    stream = types.SimpleNamespace(wait_stream=lambda other: None, device=CPU, cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("Stream", "current_stream", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: stream)
    monkeypatch.setattr(peer_copies, "OwnMemory", HostMemory)
    monkeypatch.setattr(peer_copies, "open_memory", lambda handle, device: int.from_bytes(handle[:8], "little"))
    monkeypatch.setattr(peer_copies, "close_memory", lambda address, device: None)
    monkeypatch.setattr(device_memory, "_call", copy_now)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize(("size", "tokens"), [(2, 10), (2, 7), (4, 16), (4, 9), (4, 1), (3, 5)])
def test_rows_arrive_where_collectives_bring_them(host, monkeypatch, packs, size, tokens):
    together = Together(size)
    monkeypatch.setattr(meet_triton, "meet", lambda *_: together.barrier.wait())

    def rank_does(rank):
        plain = ParallelContext(rank, size, together.of(rank))
        copies = peer_copies.PeerCopies(rank, plain.exchange, CPU)
        copies.packs = packs
        usual, ours = Split(plain, tokens), Split(replace(plain, copies=copies), tokens)
        draw = torch.Generator().manual_seed(rank)
        for dtype in (torch.float32, torch.bfloat16):
            # values lie among others, as those of a fused projection do; an odd width for rows that are no multiples of 16
            for width in (8, 3):
                fused = torch.randn(1, usual.share, 3, width * size, generator=draw).to(dtype)
                q, k, v = fused[:, :, 0].contiguous(), fused[:, :, 1].contiguous(), fused[:, :, 2]
                going = ours.ahead("values", v)
                got = ours.to_heads(ours.ahead("queries", q), ours.ahead("keys", k), going)
                wanted = usual.to_heads(q, k, v)
                assert all(map(torch.equal, got, wanted))
                mixed = wanted[0] * 2 + wanted[2]
                assert torch.equal(ours.to_tokens(mixed), usual.to_tokens(mixed))
        copies.close()

    with ThreadPoolExecutor(size) as threads:
        for future in [threads.submit(rank_does, rank) for rank in range(size)]:
            future.result(60)
