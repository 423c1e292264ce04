"""The staged reader on a GPU: the file's bits, whatever the streams do."""

import threading

import pytest
import torch
from ltx2_engine.ltx2_core.loading import pinned, ring
from ltx2_engine.ltx2_core.loading.checkpoint import read_header, read_tensors
from ltx2_engine.ltx2_core.loading.staged import Request, read_staged
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    torch.bool,
]
# some milliseconds of a stream's time
LATE_CYCLES = 5_000_000


def random_tensor(dtype, shape, seed=0):
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return data.view(dtype).reshape(shape)


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(got, want):
    return got.dtype == want.dtype and got.shape == want.shape and torch.equal(bits(got).cpu(), bits(want))


@pytest.fixture
def file(tmp_path):
    def write(tensors, name="a.safetensors"):
        save_file(tensors, tmp_path / name)
        return read_header(tmp_path / name)

    return write


@pytest.fixture
def small_ring(monkeypatch):
    """Chunks so small and few that every slot is used many times."""
    monkeypatch.setattr(ring, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(ring, "MIN_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(ring, "DEPTH", 3)
    monkeypatch.setattr(ring, "SLOT_BYTES", 3 << 14)


def requests_of(header):
    return [Request(header, info, name) for name, info in header.tensors.items()]


def weights(count, seed=0):
    """Tensors from 2 bytes to some hundred KB."""
    shapes = [(1,), (37, 1024), (333,), (128, 1024), (5, 7), (11, 4099)]
    return {f"{i:03}": random_tensor(torch.bfloat16, shapes[i % 6], seed + i) for i in range(count)} | {
        "odd": random_tensor(torch.uint8, (3,), seed)
    }


def test_every_dtype_and_shape_is_what_the_library_reads(file):
    shapes = [(), (0,), (1,), (3, 5), (2, 0, 4), (301, 4099)]
    header = file({f"{d}.{n}": random_tensor(d, s, n) for d in DTYPES for n, s in enumerate(shapes)})
    assert any(info.begin % 8 for info in header.tensors.values())
    want = load_file(header.path)
    with torch.inference_mode():
        for request, tensor in read_staged(requests_of(header), device="cuda"):
            assert same(tensor, want[request.tag])
            assert tensor.data_ptr() % 256 == 0
            assert tensor.is_contiguous()
            assert not tensor.is_inference()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    for name, tensor in read_tensors(header, ["torch.bfloat16.5"], device="cuda", dtype=torch.float32):
        assert torch.equal(bits(tensor).cpu(), bits(want[name].float()))


@pytest.mark.parametrize("threads", [1, 4, 8])
def test_interleaved_files(file, small_ring, threads):
    a, b = file(weights(120)), file(weights(120, seed=1000), "b.safetensors")
    want = {a: load_file(a.path), b: load_file(b.path)}
    asked = [r for pair in zip(requests_of(a), requests_of(b), strict=True) for r in pair]
    got = list(read_staged(asked, device="cuda", threads=threads))
    assert [r for r, _ in got] == asked
    assert all(same(tensor, want[r.file][r.info.name]) for r, tensor in got)


@pytest.mark.parametrize("chunk", [4096, 1 << 20])
def test_neighbours_may_share_memory(file, monkeypatch, chunk):
    monkeypatch.setattr(ring, "CHUNK_BYTES", chunk)
    header = file(weights(60))
    want = load_file(header.path)
    asked = [Request(header, info, name, shared=True) for name, info in header.tensors.items()]
    got = {request.tag: tensor for request, tensor in read_staged(asked, device="cuda")}
    assert all(same(got[name], want[name]) for name in want)


def test_slots_are_pinned():
    assert ring.CudaTarget(torch.device("cuda")).slot(1 << 16).memory.is_pinned()


def test_a_late_stream_gets_the_bits_although_its_tensors_are_dropped_at_once(file, small_ring):
    """A freed tensor's memory may be written to again only when the consumer's stream is done with it."""
    header = file(weights(60))
    want = load_file(header.path)
    stream = torch.cuda.Stream()
    for _ in range(10):
        copies = {}
        with torch.cuda.stream(stream):
            for request, tensor in read_staged(requests_of(header), device="cuda"):
                torch.cuda._sleep(LATE_CYCLES // 10)
                copies[request.tag] = tensor.clone()
                del tensor
        torch.cuda.synchronize()
        assert all(same(copies[name], want[name]) for name in want)


def test_the_callers_memory_is_overwritten_only_when_its_stream_is_done_with_it(file, small_ring):
    header = file({f"{i:03}": random_tensor(torch.uint8, (50_000,), i) for i in range(80)})
    want = load_file(header.path)
    stream = torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(stream):
            free = [torch.empty(50_000, dtype=torch.uint8, device="cuda") for _ in range(6)]
            pool = {tensor.data_ptr() for tensor in free}
            copies, reused = {}, 0
            given = read_staged(
                requests_of(header), device="cuda", allocate=lambda r, free=free: free.pop() if free else None
            )
            for request, tensor in given:
                torch.cuda._sleep(LATE_CYCLES // 10)
                copies[request.tag] = tensor.clone()
                if tensor.data_ptr() in pool:
                    reused += 1
                    free.append(tensor)
        torch.cuda.synchronize()
        assert reused > 6
        assert all(same(copies[name], want[name]) for name in want)


def test_the_stream_that_is_current_at_the_first_tensor_waits_for_all(file, small_ring):
    header = file({f"{i:04}": random_tensor(torch.uint8, (999,), i) for i in range(500)})
    want = load_file(header.path)
    stream = torch.cuda.Stream()
    copies = {}
    # the copies are held up, so that a stream that does not wait reads what was there before
    with torch.cuda.stream(ring._copy_stream(torch.cuda.current_device())):
        torch.cuda._sleep(LATE_CYCLES)
    results = read_staged(requests_of(header), device="cuda")
    with torch.cuda.stream(stream):
        for request, tensor in results:
            copies[request.tag] = tensor.clone()
        assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()
    assert all(same(copies[name], want[name]) for name in want)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_host_arena_is_read_into_without_the_device(file, small_ring, pinned):
    header = file(weights(60))
    want = load_file(header.path)
    arena = torch.empty(header.size_bytes, dtype=torch.uint8, pin_memory=pinned)

    def memory(request):
        part = arena[request.info.begin : request.info.end]
        return None if request.tag == "odd" else part.view(request.info.torch_dtype).reshape(request.info.shape)

    for request, tensor in read_staged(requests_of(header), device="cuda", allocate=memory):
        assert tensor.is_cuda == (request.tag == "odd")
        assert same(tensor, want[request.tag])


def test_without_pinned_memory_the_bits_are_the_same(file, small_ring, monkeypatch):
    monkeypatch.setattr(pinned, "_pin", lambda memory: False)
    monkeypatch.setattr(ring, "_idle", [])
    header = file(weights(60))
    want = load_file(header.path)
    assert all(same(t, want[r.tag]) for r, t in read_staged(requests_of(header), device="cuda"))
    assert not any(memory.pinned for memory in ring._idle)


def test_an_ended_reading_leaves_no_memory_and_no_thread(file, small_ring):
    header = file(weights(60))
    want = load_file(header.path)
    torch.cuda.synchronize()
    allocated, threads = torch.cuda.memory_allocated(), threading.active_count()
    for taken in range(8):
        results = read_staged(requests_of(header), device="cuda")
        for _ in range(taken):
            next(results)
        results.close()
        assert (torch.cuda.memory_allocated(), threading.active_count()) == (allocated, threads)
    assert all(same(t, want[r.tag]) for r, t in read_staged(requests_of(header), device="cuda"))
