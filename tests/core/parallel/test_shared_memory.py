"""Segments: shared between processes, reserved before they are written, without a name, and an error where there is no room."""

import errno
import gc
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from ltx2_engine.ltx2_core.parallel import shared_memory
from ltx2_engine.ltx2_core.parallel.placement import MAX_BYTES, Placed, lay_out, total_bytes
from ltx2_engine.ltx2_core.parallel.shared_memory import Segment, SegmentError

ROOT = Path(__file__).resolve().parents[3]


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_tensors_lie_one_behind_the_other():
    places = lay_out(
        {"frames": (torch.uint8, (3, 5, 7)), "sound": (torch.float32, (2, 11)), "none": (torch.float32, (0,))}
    )
    assert places == {
        "frames": Placed("U8", (3, 5, 7), 0),
        "sound": Placed("F32", (2, 11), 128),
        "none": Placed("F32", (0,), 256),
    }
    assert total_bytes(places) == 256
    assert total_bytes({}) == 0


@pytest.mark.parametrize(
    "fields", [("F16", (-1,), 0), ("F16", (2,), 1), ("f16", (2,), 0), ("F16", (True,), 0), ("U8", (1,), MAX_BYTES)]
)
def test_places_that_cannot_be_are_refused(fields):
    with pytest.raises(ValueError, match=r"found|beyond"):
        Placed(*fields)


def test_two_mappings_see_the_same_bytes():
    places = lay_out({"x": (torch.float32, (3, 4)), "y": (torch.bfloat16, (5,))})
    with Segment.reserve(total_bytes(places)) as ours, Segment(os.dup(ours.descriptor), ours.num_bytes) as theirs:
        theirs.tensor(places["x"])[1:] = 2.5
        theirs.tensor(places["y"]).fill_(-1)
        assert ours.tensor(places["x"]).tolist() == [[0.0] * 4, [2.5] * 4, [2.5] * 4]
        assert ours.tensor(places["y"]).tolist() == [-1.0] * 5
        assert ours.tensor(Placed("F32", (0, 3), 0)).shape == (0, 3)


def test_places_beyond_the_end_are_refused():
    with Segment.reserve(64) as segment:
        segment.tensor(Placed("U8", (64,), 0))
        with pytest.raises(SegmentError, match="beyond the segment's 64 bytes"):
            segment.tensor(Placed("U8", (64,), 1))
    with pytest.raises(SegmentError, match="closed"):
        segment.tensor(Placed("U8", (64,), 0))


def test_a_file_smaller_than_announced_is_refused():
    before = descriptors()
    with Segment.reserve(4096) as segment:
        for num_bytes in (4097, 0):
            with pytest.raises(SegmentError, match="announced"):
                Segment(os.dup(segment.descriptor), num_bytes)
    gc.collect()
    assert descriptors() == before


def test_tensors_outlive_the_segment_and_nothing_outlives_them():
    before, names = descriptors(), set(os.listdir("/dev/shm"))
    segment = Segment.reserve(1 << 20)
    x = segment.tensor(Placed("U8", (1 << 20,), 0))
    x.fill_(7)
    assert os.stat(segment.descriptor).st_nlink == 0, "it has a name"
    assert os.stat(segment.descriptor).st_mode & 0o777 == 0o600
    assert os.stat(segment.descriptor).st_blocks * 512 >= 1 << 20, "not all of it is there"
    segment.close()
    assert x.sum() == 7 << 20
    del x
    assert descriptors() == before
    assert set(os.listdir("/dev/shm")) == names


def test_the_temporary_folder_takes_what_shared_memory_does_not(monkeypatch, tmp_path):
    reserve, asked = os.posix_fallocate, []

    def full(descriptor, offset, num_bytes):
        asked.append(os.fstat(descriptor).st_dev)
        if len(asked) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(shared_memory.tempfile, "gettempdir", lambda: str(tmp_path))
    before = descriptors()
    with Segment.reserve(4096) as segment:
        segment.tensor(Placed("U8", (4096,), 0)).fill_(1)
    assert asked == [os.stat("/dev/shm").st_dev, tmp_path.stat().st_dev]
    assert descriptors() == before
    assert list(tmp_path.iterdir()) == []


def test_no_room_anywhere_is_an_error_with_every_reason(tmp_path):
    before = descriptors()
    with pytest.raises(SegmentError, match=r"no room for .*absent: No such file.*; .*"):
        Segment.reserve(1 << 60, (tmp_path / "absent", tmp_path))
    assert descriptors() == before


def test_a_full_mount_is_an_error_not_a_signal():
    """On a file system of one MiB of its own, in namespaces of its own."""
    mount = "mount -t tmpfs -o size=1m none /dev/shm"
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    code = f"""
        import sys, types
        package = types.ModuleType("ltx2_engine")
        package.__path__ = [{str(ROOT)!r}]
        sys.modules["ltx2_engine"] = package
        from ltx2_engine.ltx2_core.parallel.placement import Placed
        from ltx2_engine.ltx2_core.parallel.shared_memory import SHARED_MEMORY, Segment, SegmentError

        half = Segment.reserve(600_000, (SHARED_MEMORY,))
        half.tensor(Placed("U8", (600_000,), 0)).fill_(1)
        try:
            Segment.reserve(600_000, (SHARED_MEMORY,))
        except SegmentError as error:
            print(error)
        Segment.reserve(600_000).tensor(Placed("U8", (600_000,), 0)).fill_(1)
        print("elsewhere")
    """
    command = f'{mount} && exec "$0" -c "$1"'
    run = subprocess.run([*inside, command, sys.executable, textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "/dev/shm: No space left on device" in run.stdout
    assert run.stdout.endswith("elsewhere\n")
