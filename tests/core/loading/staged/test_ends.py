"""How readings by the staged reader end: by errors, by whoever asked for them, and with nothing left behind."""

import contextlib
import errno
import gc
import os
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from ltx2_engine.ltx2_core.host import Interrupted
from ltx2_engine.ltx2_core.loading import pinned, ring, staged
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError
from ltx2_engine.ltx2_core.loading.staged import read_staged

from .shared import Late, check, numbered, patch_read, random_tensor, readers, requests_of

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
