"""The staged reader: what the safetensors library reads, whatever the layout, the device's pace and the end."""

import contextlib
import errno
import gc
import logging
import os
import threading
import time
import weakref
from collections import deque
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ltx2_engine.ltx2_core.host import Interrupted
from ltx2_engine.ltx2_core.loading import pinned, ring, staged
from ltx2_engine.ltx2_core.loading.checkpoint import Checkpoint, CheckpointError, TensorInfo, read_header
from ltx2_engine.ltx2_core.loading.staged import Request, read_staged
from safetensors.torch import load_file, save_file

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
    *(torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64),
    torch.bool,
]
SHAPES = [(), (0,), (1,), (3, 5), (2, 0, 4), (7, 1, 3, 2), (61,)]


def random_tensor(dtype, shape, seed=0):
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return data.view(dtype).reshape(shape)


def bits(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same(got, want):
    return got.dtype == want.dtype and got.shape == want.shape and torch.equal(bits(got), bits(want))


class Late(ring.Target):
    """A device whose copies run behind, one after another, as on a stream.

    given_is_host: what the caller gives is host memory, and only what is made here belongs to the device.
    """

    delay = 0.0005
    given_is_host = False

    def __init__(self, device):
        super().__init__(device)
        self.queue = SimpleQueue()
        self.thread = threading.Thread(target=self.run, name="late stream", daemon=True)
        self.thread.start()
        self.slots = 0
        self.consumer = threading.current_thread()
        self.made = None

    def run(self):
        for pairs, event in iter(self.queue.get, None):
            time.sleep(self.delay)
            with torch.inference_mode():
                for to, source in pairs:
                    to.copy_(source)
            event.set()

    def slot(self, size):
        self.slots += 1
        slot = super().slot(size)
        slot.memory.fill_(0xEE)
        return slot

    def empty(self, shape, dtype):
        self.made = super().empty(shape, dtype)
        return self.made

    def is_host_memory(self, tensor):
        return self.given_is_host and tensor is not self.made

    def copy(self, pairs, after):
        assert threading.current_thread() is self.consumer, "copies are begun by the consumer"
        event = threading.Event()
        event.query, event.synchronize = event.is_set, event.wait
        self.queue.put((pairs, event))
        return event

    def hand_over(self, copied):
        if copied is not None:
            copied.wait()

    def close(self):
        self.queue.put(None)
        self.thread.join()
        self.made = None


@pytest.fixture(params=["host", "plain", "late", "mixed"])
def path_to_memory(request, monkeypatch):
    """Straight into host memory; through slots with copies that end at once, or late; or by who made the tensor."""
    if request.param == "plain":
        monkeypatch.setattr(ring.Target, "is_host_memory", lambda self, tensor: False)
    elif request.param in ("late", "mixed"):
        monkeypatch.setattr(staged, "target_of", Late)
        monkeypatch.setattr(Late, "given_is_host", request.param == "mixed")
    return request.param


@pytest.fixture
def sizes(monkeypatch):
    """A function that sets how large chunks are and how many are in flight."""

    def set_sizes(chunk=16, slots=3, least=None):
        monkeypatch.setattr(ring, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(ring, "MIN_CHUNK_BYTES", least or chunk)
        monkeypatch.setattr(ring, "DEPTH", slots)
        monkeypatch.setattr(ring, "SLOT_BYTES", max(1, chunk * 2 // 5))

    return set_sizes


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert readers() == []


def readers():
    return [t.name for t in threading.enumerate() if t.name.startswith(("ltx2 reader", "late"))]


@pytest.fixture
def file(tmp_path):
    """A function that writes tensors and returns the file's header."""

    def write(tensors, name="a.safetensors"):
        save_file(tensors, tmp_path / name)
        return read_header(tmp_path / name)

    return write


def requests_of(header, names=None):
    return [Request(header, header.tensors[name], name) for name in (header.tensors if names is None else names)]


def check(results, *headers):
    """Compare with the library; returns the tags in order."""
    want = {header: load_file(header.path) for header in headers}
    tags = []
    for request, tensor in results:
        assert same(tensor, want[request.file][request.info.name]), request.info.name
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "memory of its own"
        assert not tensor.is_inference()
        tags.append(request.tag)
    return tags


def patch_read(monkeypatch, before):
    """Call ``before(file, buffers, offset)`` ahead of each read."""
    read = ring._read_at

    def patched(opened, buffers, offset):
        before(opened, buffers, offset)
        return read(opened, buffers, offset)

    monkeypatch.setattr(ring, "_read_at", patched)


def numbered(count, elements=4):
    return {f"t{i:04}": torch.full((elements,), float(i)) for i in range(count)}


# what is read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_every_dtype_and_shape_is_what_the_library_reads(file, path_to_memory, sizes, monkeypatch, threads, chunk):
    if chunk:
        sizes(chunk, slots=16)
    monkeypatch.setattr(Late, "delay", 0.0)
    tensors = {f"{d}.{n}": random_tensor(d, s, n) for d in DTYPES for n, s in enumerate(SHAPES)}
    header = file(tensors)
    assert any(info.begin % 8 for info in header.tensors.values()), "some lie at odd places"
    tags = check(read_staged(requests_of(header), device="cpu", threads=threads), header)
    assert tags == list(header.tensors)


@pytest.mark.parametrize("positioned", [True, False])
def test_requests_of_two_files_may_interleave_repeat_and_run_backwards(
    file, path_to_memory, sizes, monkeypatch, positioned
):
    if not positioned:
        monkeypatch.setattr(ring, "_POSITIONED", False)
        monkeypatch.delattr(os, "preadv", raising=False)
    sizes(24, slots=4)
    tensors = {f"{i}": random_tensor(torch.int16, (i * 3 % 17,), i) for i in range(60)}
    a, b = file(tensors), file({name: tensor + 1 for name, tensor in tensors.items()}, "b.safetensors")
    asked = [r for pair in zip(requests_of(a), reversed(requests_of(b)), strict=True) for r in pair]
    asked += requests_of(a, ["3", "3", "59", "4"])
    tags = check(read_staged(asked, device="cpu", threads=4), a, b)
    assert tags == [r.tag for r in asked]


def test_nothing_to_read(file, path_to_memory):
    assert list(read_staged([], device="cpu")) == []
    header = file({"none": torch.zeros(0, 3)})
    assert check(read_staged(requests_of(header), device="cpu"), header) == ["none"]


def test_a_tensor_may_be_much_larger_than_the_ring(file, path_to_memory, sizes):
    sizes(64, slots=3)
    header = file({"small": torch.arange(3), "large": random_tensor(torch.int32, (50, 101)), "z": torch.arange(2)})
    check(read_staged(requests_of(header), device="cpu"), header)


@pytest.mark.parametrize("positioned", [True, False])
def test_many_tiny_tensors_take_few_reads(file, path_to_memory, monkeypatch, positioned):
    header = file(numbered(3000, elements=5))
    calls = []
    patch_read(monkeypatch, lambda *call: calls.append(call))
    if positioned:
        check(read_staged(requests_of(header), device="cpu"), header)
        assert len(calls) <= 3000 / ring._MAX_TENSORS + 1
    else:
        monkeypatch.setattr(ring, "_POSITIONED", False)
        check(read_staged(requests_of(header), device="cpu"), header)


def test_no_byte_is_read_that_nobody_asked_for(file, path_to_memory, sizes, monkeypatch):
    sizes(40)
    header = file(numbered(60))
    asked = requests_of(header, [n for i, n in enumerate(header.tensors) if i % 5 < 2])
    ranges = []
    patch_read(monkeypatch, lambda _, buffers, offset: ranges.append((offset, offset + sum(map(len, buffers)))))
    check(read_staged(asked, device="cpu"), header)
    read = sorted(byte for begin, end in ranges for byte in range(begin, end))
    assert read == [byte for r in asked for byte in range(r.info.begin, r.info.end)]


def test_short_reads_are_continued(file, path_to_memory, sizes, monkeypatch):
    sizes(100)
    header = file({f"{n}": random_tensor(torch.uint8, (n,), n) for n in range(30)})

    read = ring._read_at

    def short(opened, buffers, offset):
        part, room = [], 7
        for buffer in buffers:
            part.append(buffer[:room])
            room -= len(part[-1])
        return read(opened, part, offset)

    monkeypatch.setattr(ring, "_read_at", short)
    check(read_staged(requests_of(header), device="cpu"), header)


def test_blocks_and_unknown_types_are_flat_bytes(tmp_path, path_to_memory):
    data = random_tensor(torch.uint8, (512,))
    path = tmp_path / "a.gguf"
    path.write_bytes(data.numpy().tobytes())
    tensors = {"w": TensorInfo("w", "Q4_K", (2, 256), 32, 320), "b": TensorInfo("b", "F32", (4,), 320, 336)}
    status = path.stat()
    header = Checkpoint(path, {}, tensors, status.st_size, status.st_mtime_ns)
    (_, blocks), (_, plain) = read_staged(requests_of(header), device="cpu")
    assert same(blocks, data[32:320])
    assert same(plain, data[320:336].view(torch.float32))


def test_tensors_are_normal_ones_while_the_caller_infers(file, path_to_memory):
    header = file(numbered(3))
    with torch.inference_mode():
        for _, tensor in read_staged(requests_of(header), device="cpu"):
            assert torch.is_inference_mode_enabled()
            assert not tensor.is_inference()
    tensor.add_(1)  # an inference tensor would refuse


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout_read_in_any_way(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    layouts = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)), max_size=9)
    headers = []
    for name in ("x.sft", "y.sft"):
        tensors = {f"{i}": random_tensor(d, s, i) for i, (d, s) in enumerate(data.draw(layouts, label=name))}
        save_file(tensors, folder / name)
        headers.append(read_header(folder / name))
    every = [r for header in headers for r in requests_of(header)]
    asked = data.draw(st.lists(st.sampled_from(every), max_size=25), label="requests") if every else []
    if data.draw(st.booleans(), label="whole"):
        asked = every + asked
    given_memory = data.draw(st.sets(st.integers(0, 40)), label="given")
    number = iter(range(len(asked)))

    def allocate(request):
        mine = next(number) in given_memory
        return torch.empty(request.info.torch_shape, dtype=request.info.torch_dtype) if mine else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "CHUNK_BYTES", data.draw(st.integers(4, 200), label="chunk"))
        patch.setattr(ring, "MIN_CHUNK_BYTES", data.draw(st.integers(1, 200), label="least"))
        patch.setattr(ring, "DEPTH", data.draw(st.integers(1, 5), label="depth"))
        patch.setattr(ring, "SLOT_BYTES", data.draw(st.integers(1, 200), label="slot"))
        patch.setattr(ring, "_POSITIONED", data.draw(st.booleans(), label="positioned") and ring._POSITIONED)
        if data.draw(st.booleans(), label="late"):
            patch.setattr(staged, "target_of", Late)
            patch.setattr(Late, "delay", 0.0)
            patch.setattr(Late, "given_is_host", data.draw(st.booleans(), label="given is host"))
        threads = data.draw(st.integers(1, 4), label="threads")
        counts = []
        results = read_staged(asked, device="cpu", threads=threads, allocate=allocate, on_bytes=counts.append)
        check(results, *headers)
    assert sum(counts) == sum(r.info.size_bytes for r in asked)
    assert readers() == []


# how it is taken -----------------------------------------------------------------------------------------------------


def test_requests_are_taken_only_as_far_ahead_as_the_ring_reaches(file, path_to_memory, sizes):
    sizes(16, slots=3)
    header = file(numbered(40))  # 16 bytes each: a chunk
    taken = 0

    def asked():
        nonlocal taken
        for request in requests_of(header):
            taken += 1
            yield request

    ahead = []
    for given_back, _ in enumerate(read_staged(asked(), device="cpu"), 1):
        ahead.append(taken - given_back)
    assert max(ahead) <= 3
    assert ahead[0] == 2, "it does read ahead"


def test_the_caller_may_put_requests_in_while_it_reads(file, path_to_memory, sizes):
    sizes(16, slots=3)
    header = file(numbered(30))
    waiting = deque(requests_of(header)[:20])
    late = deque(requests_of(header)[20:])

    def asked():
        while waiting:
            yield waiting.popleft()

    got = []
    for request, tensor in read_staged(asked(), device="cpu"):
        got.append((request.tag, tensor[0].item()))
        if late and len(got) % 2:
            waiting.appendleft(late.popleft())
    names = list(header.tensors)
    assert sorted(got) == [(name, float(names.index(name))) for name in names]
    assert [tag for tag, _ in got] != names


def test_nothing_starts_before_the_first_tensor_is_asked_for(file):
    taken = []
    results = read_staged((taken.append(r) or r for r in requests_of(file(numbered(3)))), device="cpu")
    assert (taken, readers()) == ([], [])
    results.close()


def test_few_chunks_start_few_threads(file, sizes):
    header, seen = file(numbered(64)), []
    for _ in read_staged(requests_of(header), device="cpu", on_bytes=lambda _: seen.append(len(readers()))):
        pass
    assert seen == [1]
    sizes(16, slots=8)
    for _ in read_staged(requests_of(header), device="cpu", threads=3):
        seen.append(len(readers()))
    assert max(seen) == 3


@pytest.mark.parametrize(("cores", "threads"), [(1, 4), (4, 4), (8, 6), (14, 12), (18, 12), (128, 12)])
def test_readers_leave_cores_to_those_that_they_read_for(monkeypatch, cores, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert ring._default_threads() == threads


def test_bytes_are_counted_in_the_callers_thread_before_the_tensor_comes(file, path_to_memory, sizes):
    sizes(16)
    header = file({"a": torch.arange(10.0), "b": torch.arange(3.0)})
    events, threads = [], set()

    def on_bytes(count):
        events.append(count)
        threads.add(threading.get_ident())

    for request, _ in read_staged(requests_of(header), device="cpu", on_bytes=on_bytes):
        events.append(request.tag)
    assert events == [16, 16, 16, "a", 4, "b"]
    assert threads == {threading.get_ident()}


def test_the_log_tells_the_speed_of_large_readings(file, monkeypatch, caplog):
    header = file(numbered(10))
    with caplog.at_level(logging.INFO, logger="ltx2.loading"):
        list(read_staged(requests_of(header), device="cpu"))
        assert caplog.records == []
        monkeypatch.setattr(staged, "_LOGGED_BYTES", 100)
        list(read_staged(requests_of(header), device="cpu"))
    assert caplog.messages[0].startswith("read 10 tensors, 0.00 GB in 0.")
    assert "GB/s" in caplog.messages[0]
    assert len(caplog.messages) == 1


def test_a_tensor_that_the_caller_drops_is_freed(file, path_to_memory, sizes):
    sizes(16)
    header = file(numbered(20))
    last = None
    gc.disable()
    try:
        for _, tensor in read_staged(requests_of(header), device="cpu"):
            assert last is None or last() is None
            last = weakref.ref(tensor)
            del tensor
    finally:
        gc.enable()


def test_slow_disks_are_asked_for_less_at_once(file, sizes, monkeypatch):
    sizes(64, slots=2, least=8)
    monkeypatch.setattr(ring, "_SLOW_SECONDS", 0.02)
    monkeypatch.setattr(ring, "_FAST_SECONDS", 0.015)
    header = file(numbered(200))
    slow, asked = True, []

    def before(_, buffers, offset):
        asked.append(sum(map(len, buffers)))
        if slow:
            time.sleep(0.03)

    patch_read(monkeypatch, before)
    results = read_staged(requests_of(header), device="cpu", threads=2)
    for _ in range(20):
        next(results)
    assert set(asked) == {8}
    slow = False
    for _ in range(100):
        next(results)
    assert max(asked) == ring.SLOT_BYTES, "they grow when the disk turns out fast"
    slow = True
    list(results)
    assert asked[-2] == 8, "and shrink"


# memory that the caller gives ----------------------------------------------------------------------------------------


def test_bytes_go_to_the_memory_that_the_caller_gives(file, path_to_memory, sizes):
    sizes(24)
    header = file({f"{i}": random_tensor(d, (5, 3), i) for i, d in enumerate(DTYPES)})
    arena = torch.zeros(len(DTYPES), 256, dtype=torch.uint8)
    memory = {
        name: arena[i, : info.size_bytes].view(info.torch_dtype).reshape(info.torch_shape)
        for i, (name, info) in enumerate(header.tensors.items())
        if i % 3
    }
    want = load_file(header.path)
    for request, tensor in read_staged(requests_of(header), device="cpu", allocate=lambda r: memory.get(r.tag)):
        assert same(tensor, want[request.tag])
        assert memory.get(request.tag, tensor) is tensor
    assert all(same(memory[name], want[name]) for name in memory)


@pytest.mark.parametrize("infers", [False, True])
def test_parameters_and_inference_tensors_can_be_read_into(file, path_to_memory, infers):
    tensors = {"parameter": torch.randn(700), "wide": torch.randn(700), "bytes": random_tensor(torch.uint8, (700,))}
    header = file(tensors)
    with torch.inference_mode():
        inferred = {name: torch.zeros_like(tensors[name]) for name in ("wide", "bytes")}
    memory = inferred | {"parameter": torch.nn.Parameter(torch.zeros(700))}
    with torch.inference_mode(infers):
        for request, tensor in read_staged(requests_of(header), device="cpu", allocate=lambda r: memory[r.tag]):
            assert tensor is memory[request.tag]
    assert all(same(memory[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "memory",
    [
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(2, 2),
        torch.zeros(8)[::2],
        torch.zeros(4, device="meta"),
    ],
    ids=["dtype", "shape", "strides", "device"],
)
def test_unfit_memory_is_refused(file, memory):
    with pytest.raises(ValueError, match=r"'t0000' is torch.float32 \[4\] for cpu; it was given memory of"):
        list(read_staged(requests_of(file(numbered(2))), device="cpu", allocate=lambda r: memory))


# errors --------------------------------------------------------------------------------------------------------------


def failing(requests, match, **options):
    """Read until the error; returns the tags that came before it."""
    tags = []

    def read():
        for request, _ in read_staged(requests, device="cpu", **options):
            tags.append(request.tag)

    with pytest.raises(CheckpointError, match=match) as error:
        read()
    assert str(error.value).startswith(f"{requests[-1].file.path}: ")
    assert readers() == []
    return tags


@pytest.mark.parametrize("missing", [5, 16])
@pytest.mark.parametrize("chunk", [16, 40, 4096])
def test_a_file_cut_short_while_it_is_read(file, path_to_memory, sizes, monkeypatch, chunk, missing):
    sizes(chunk, slots=4)
    header = file(numbered(100))
    names = list(header.tensors)
    end = header.tensors[names[70]].end - missing

    def cut(*_):
        os.truncate(header.path, end)

    patch_read(monkeypatch, cut)
    # threads that share no open file find it changed when they open it
    threads = 4 if ring._POSITIONED else 1
    match = f"the file ends {missing} bytes before the end of tensor 't0070': it was cut short.*download it"
    tags = failing(requests_of(header), match, threads=threads)
    assert tags == names[:70]


@pytest.mark.parametrize("chunk", [16, 40, 4096])
def test_a_disk_error_comes_at_the_tensors_place(file, path_to_memory, sizes, monkeypatch, chunk):
    sizes(chunk, slots=4)
    header = file(numbered(100))
    names = list(header.tensors)
    bad = header.tensors[names[33]].begin + 3
    read = ring._read_at

    def broken(opened, buffers, offset):
        """As the kernel does it: what comes before the bad sector, then the error."""
        if offset == bad:
            raise OSError(errno.EIO, "Input/output error")
        room = bad - offset if offset < bad else 1 << 30
        part = []
        for buffer in buffers:
            part.append(buffer[: max(0, room)])
            room -= len(buffer)
        return read(opened, part, offset)

    monkeypatch.setattr(ring, "_read_at", broken)
    match = r"reading failed \(Input/output error\) at tensor 't0033': check the disk"
    assert failing(requests_of(header), match, threads=4) == names[:33]
    monkeypatch.setattr(ring, "_read_at", read)
    assert len(check(read_staged(requests_of(header), device="cpu"), header)) == 100


@pytest.mark.parametrize("positioned", [True, False])
def test_a_file_changed_since_its_header_was_read(file, path_to_memory, sizes, monkeypatch, positioned):
    monkeypatch.setattr(ring, "_POSITIONED", positioned and ring._POSITIONED)
    sizes(16, slots=6)
    header = file(numbered(40))
    os.utime(header.path, ns=(0, header.mtime_ns + 1))
    match = r"changed after its header was read \(at tensor 't0000'\): load the model again"
    assert failing(requests_of(header), match, threads=4) == []


def test_an_absent_file_among_others(file, path_to_memory, sizes):
    sizes(16)
    good, absent = file(numbered(9)), file(numbered(3), "b.safetensors")
    absent.path.unlink()
    both = requests_of(good) + requests_of(absent)
    assert failing(both, r"reading failed \(No such file.*'t0000': check the disk") == list(good.tensors)
    none = file({"none": torch.zeros(0)}, "c.safetensors")
    none.path.unlink()
    failing(requests_of(none), "No such file.*'none'")


@pytest.mark.parametrize("method", ["enter_thread", "slot", "copy", "hand_over"])
def test_an_error_of_the_device_reaches_the_caller(file, monkeypatch, sizes, method):
    class Broken(Late):
        pass

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    setattr(Broken, method, fail)
    monkeypatch.setattr(staged, "target_of", Broken)
    sizes(16)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(read_staged(requests_of(file(numbered(20))), device="cpu"))


def test_slots_of_a_reading_serve_the_next(file, monkeypatch, sizes):
    monkeypatch.setattr(staged, "target_of", Late)
    monkeypatch.setattr(ring, "_idle", [])
    sizes(5000, slots=3)
    made = []
    monkeypatch.setattr(ring, "PinnedMemory", lambda size: made.append(pinned.PinnedMemory(size)) or made[-1])
    for _ in range(3):
        list(read_staged(requests_of(file(numbered(2000))), device="cpu", threads=2))
    assert 1 <= len(made) <= 2 + ring._SPARE_SLOTS
    assert {id(memory) for memory in ring._idle} == {id(memory) for memory in made}


def shared(header):
    return [Request(header, info, name, shared=True) for name, info in header.tensors.items()]


def test_neighbours_may_share_memory_and_hold_the_same_bits(file, path_to_memory, sizes):
    sizes(200, slots=3)
    shapes = [(16,), (7,), (32,), (3, 16), (0,), (64,), (500,), (16,)]
    header = file({f"{n:02}": random_tensor(torch.uint8, shape, n) for n, shape in enumerate(shapes * 3)})
    want = load_file(header.path)
    got = {request.tag: tensor for request, tensor in read_staged(shared(header), device="cpu")}
    assert list(got) == list(header.tensors)
    assert all(same(got[name], want[name]) for name in want)
    storages = {tensor.untyped_storage().data_ptr() for tensor in got.values() if tensor.numel()}
    assert len(storages) < len([tensor for tensor in got.values() if tensor.numel()]), "nothing is shared"
    assert all(tensor.data_ptr() % 16 == 0 for tensor in got.values() if tensor.numel())


def test_what_lies_between_neighbours_keeps_its_own_memory(file, path_to_memory, sizes):
    """Weights that share memory have biases between them that are read to their places."""
    sizes(200, slots=3)
    tensors = {f"{n:02}": random_tensor(torch.uint8, (48,), n) for n in range(16)}
    a = file({name: tensors[name] for name in tensors if name < "08"}, "a.safetensors")
    b = file({name: tensors[name] for name in tensors if name >= "08"}, "b.safetensors")
    places = {name: torch.empty(48, dtype=torch.uint8) for name in ("01", "02", "05", "10")}
    asked = [*shared(a), *shared(b)]
    results = read_staged(asked, device="cpu", allocate=lambda request: places.get(request.tag))
    got = {request.tag: tensor for request, tensor in results}
    assert list(got) == list(tensors)
    assert all(same(got[name], tensors[name]) for name in tensors)
    assert all(got[name].data_ptr() == place.data_ptr() for name, place in places.items())
    storages = {name: got[name].untyped_storage().data_ptr() for name in tensors if name not in places}
    assert len(set(storages.values())) == 2, "one piece for each file"
    assert storages["00"] == storages["07"] != storages["08"] == storages["15"]


def test_a_piece_that_is_cut_short_gives_the_tensors_before_the_end(file, path_to_memory, sizes):
    sizes(1 << 16)
    header = file({f"{n:02}": random_tensor(torch.uint8, (32,), n) for n in range(20)})
    want, whole = load_file(header.path), header.path.read_bytes()
    got = {}

    def cut(fd, buffers, offset, read=os.preadv):
        count = read(fd, buffers, offset)
        end = header.tensors["07"].begin + 5
        return max(min(count, end - offset), 0)

    def collect():
        for request, tensor in read_staged(shared(header), device="cpu"):
            got[request.tag] = tensor.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", cut)
        with pytest.raises(CheckpointError, match="'07'"):
            collect()
    assert list(got) == [f"{n:02}" for n in range(7)]
    assert all(same(got[name], want[name]) for name in got)
    assert header.path.read_bytes() == whole


# ends ----------------------------------------------------------------------------------------------------------------


class Ended(Exception):
    pass


def end_by_stopped(asked):
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        list(read_staged(asked, device="cpu", stopped=lambda: time.monotonic() > begun + 0.1))


def end_by_a_flag_that_is_raised_once(asked):
    flags = iter([False] * 5 + [True])
    with pytest.raises(Interrupted):
        list(read_staged(asked, device="cpu", stopped=lambda: next(flags, False)))


def end_by_stopped_failing(asked):
    def stopped():
        raise Ended

    with pytest.raises(Ended):
        list(read_staged(asked, device="cpu", stopped=stopped))


def end_by_on_bytes(asked):
    def on_bytes(_):
        raise Ended

    with pytest.raises(Ended):
        list(read_staged(asked, device="cpu", on_bytes=on_bytes))


def end_by_closing(asked):
    results = read_staged(asked, device="cpu")
    next(results)
    results.close()


def end_by_dropping(asked):
    results = read_staged(asked, device="cpu")
    next(results)
    del results


def end_by_the_loop(asked):
    with contextlib.suppress(Ended):
        for _ in read_staged(asked, device="cpu"):
            raise Ended


def end_by_the_requests(asked):
    def some():
        yield from asked[:7]
        raise Ended

    with pytest.raises(Ended):
        list(read_staged(some(), device="cpu"))


def end_by_allocate(asked):
    def allocate(request):
        if request.tag == "t0004":
            raise Ended

    with pytest.raises(Ended):
        list(read_staged(asked, device="cpu", allocate=allocate))


@pytest.mark.parametrize("end", [f for name, f in sorted(globals().items()) if name.startswith("end_by_")])
def test_however_it_ends_no_thread_is_left_and_the_next_reading_works(file, path_to_memory, sizes, monkeypatch, end):
    sizes(64, slots=4)
    header = file(numbered(400))
    before = threading.active_count()
    with monkeypatch.context() as slow:
        patch_read(slow, lambda *_: time.sleep(0.05))
        begun = time.monotonic()
        end(requests_of(header))
        assert time.monotonic() - begun < 1.0
        assert readers() == []
    assert threading.active_count() == before
    check(read_staged(requests_of(header), device="cpu"), header)


def test_a_stop_takes_effect_within_a_chunk(file, path_to_memory, sizes, monkeypatch):
    sizes(64, slots=2)
    header = file(numbered(20))

    def slow(opened, buffers, offset):
        time.sleep(0.05)
        buffers[0][:1] = os.pread(opened.fileno(), 1, offset)
        return 1

    monkeypatch.setattr(ring, "_read_at", slow)
    begun = time.monotonic()
    end_by_stopped(requests_of(header))
    assert time.monotonic() - begun < 1.0


def test_memory_of_an_ended_reading_is_freed(file, path_to_memory, sizes, monkeypatch):
    sizes(64, slots=4)
    header = file(numbered(100))
    made = []
    empty = ring.Target.empty

    def recorded(self, *args):
        tensor = empty(self, *args)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(ring.Target, "empty", recorded)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    gc.disable()
    try:
        for end in (end_by_closing, end_by_the_loop, end_by_on_bytes, end_by_stopped_failing):
            end(requests_of(header))
            assert len(made) > 10
            assert [ref for ref in made if ref() is not None] == []
            made.clear()
        monkeypatch.setattr(ring, "_read_at", fail)
        failing(requests_of(header), "Input/output error")
        assert len(made) > 10
        assert [ref for ref in made if ref() is not None] == []
    finally:
        gc.enable()


def test_files_are_closed_at_the_end(file, path_to_memory):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files cannot be listed here")
    header = file(numbered(20))
    before = len(os.listdir("/proc/self/fd"))
    for end in (end_by_closing, end_by_on_bytes, list):
        end(requests_of(header) if end is not list else read_staged(requests_of(header), device="cpu"))
        assert len(os.listdir("/proc/self/fd")) == before


def test_several_readings_at_once(file, path_to_memory, sizes):
    sizes(64, slots=3)
    a, b = file(numbered(50)), file(numbered(50), "b.safetensors")
    running = [read_staged(requests_of(header), device="cpu", threads=2) for header in (a, b, a)]
    rows = list(zip(*running, strict=True))
    for row in rows:
        assert len({request.tag for request, _ in row}) == 1
        check(row, a, b)


def test_slots_are_used_again_only_when_nothing_is_copied_from_them(file, sizes, monkeypatch):
    monkeypatch.setattr(staged, "target_of", Late)
    monkeypatch.setattr(Late, "delay", 0.002)
    # nobody waits for the device, as on a stream: only the slots' own events keep the bytes
    monkeypatch.setattr(Late, "hand_over", lambda self, copied: None)
    sizes(64, slots=2)
    header = file({f"{i:03}": random_tensor(torch.uint8, (64,), i) for i in range(150)})
    results = list(read_staged(requests_of(header), device="cpu", threads=2))
    check(results, header)
