"""The staged reader: what the safetensors library reads, whatever the layout and the device's pace."""

import gc
import logging
import os
import threading
import time
import weakref
from collections import deque

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ltx2_engine.ltx2_core.loading import ring, staged
from ltx2_engine.ltx2_core.loading.checkpoint import Checkpoint, TensorInfo, read_header
from ltx2_engine.ltx2_core.loading.staged import read_staged
from safetensors.torch import save_file

from .shared import DTYPES, SHAPES, Late, check, numbered, patch_read, random_tensor, readers, requests_of, same

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
