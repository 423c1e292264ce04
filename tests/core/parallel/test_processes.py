"""Workers as real processes: jobs, interrupts, deaths of all kinds, and that nothing is left behind."""

import gc
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from ltx2_engine.ltx2_core.parallel.job_run import WorkerError
from ltx2_engine.ltx2_core.parallel.messages import Message, MessageError
from ltx2_engine.ltx2_core.parallel.placement import lay_out, total_bytes
from ltx2_engine.ltx2_core.parallel.processes import Launch, Patience
from ltx2_engine.ltx2_core.parallel.shared_memory import Segment
from ltx2_engine.ltx2_core.parallel.worker_environment import worker_environment
from ltx2_engine.ltx2_core.parallel.worker_group import StaleHandle, WorkerGroup, WorkersBusy

from .observe import Sockets, after, alive, internet_sockets, open_files, wait_for

ROOT = Path(__file__).resolve().parents[3]
ENTRY = Path(__file__).with_name("worker_jobs.py")
PATIENCE = Patience(start=60, silence=1, others=1, stop=1, end=1)


@pytest.fixture(scope="module", autouse=True)
def no_internet_sockets():
    """From before the first worker until after the last one, no socket but the connected pairs is there."""
    before = internet_sockets()
    sockets = Sockets()
    yield
    sockets.done.set()
    sockets.join()
    assert sockets.seen <= before


@pytest.fixture(scope="module")
def group():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("OF_THE_PARENT", "kept")
        group = WorkerGroup(Launch(2, ENTRY, {"OF_THE_GROUP": "yes"}, PATIENCE))
        yield group
        group.close()


def about(group):
    return [answer.body for answer in group.run(Message("job", name="about"))]


def pids(group):
    return [body["pid"] for body in about(group)]


# jobs ----------------------------------------------------------------------------------------------------------------


def test_every_rank_answers_and_tells_its_progress(group):
    x, events = torch.randn(3, 5).to(torch.bfloat16), []
    answers = group.run(
        Message("job", name="echo", tensors={"x": x}), on_progress=lambda rank, message: events.append((rank, message))
    )
    assert [answer.body["rank"] for answer in answers] == [0, 1]
    assert all(torch.equal(answer.tensor("x", torch.bfloat16, (3, 5)), x) for answer in answers)
    assert sorted(rank for rank, _ in events) == [0, 1]
    assert all(torch.equal(event.tensors["preview"], x[:1]) and event.body == {"step": 1} for _, event in events)


def test_workers_write_a_large_result_into_shared_memory(group):
    places = lay_out({"frames": (torch.float32, (9, 64, 96, 3))})
    with Segment.reserve(total_bytes(places)) as segment:
        answers = group.run(Message("job", name="frames", placed=places, segment=segment))
        frames = segment.tensor(answers[0].placed["frames"])
    assert frames[:, 0, 0, 0].tolist() == [1, 2] * 4 + [1]


def test_a_worker_has_its_own_folder_the_parents_environment_and_no_descriptor_of_others(group):
    for rank, body in enumerate(about(group)):
        found = body["environment"]
        assert (found["OF_THE_PARENT"], found["OF_THE_GROUP"]) == ("kept", "yes")
        assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert found["TMPDIR"] == body["folder"]
        assert (body["folder_mode"], body["group_mode"]) == (0o700, 0o700)
        assert len(body["folder"]) < 80
        assert str(ROOT / "ltx2_core" / "parallel") not in body["path"]
        assert not {"comfy", "nodes", "messages", "channel"} & set(body["modules"])
        assert sum(name.startswith("socket:") for name in body["descriptors"]) == 1
        assert "ltx2 inbox" in body["threads"]


def test_an_environment_is_the_parents_plus_additions(tmp_path):
    parent = {"HOME": "/h", "GLOO_SOCKET_IFNAME": "eth0", "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
    found = worker_environment(parent, {"OMP_NUM_THREADS": "2", "RANK": "9"}, 1, 4, tmp_path)
    assert (
        found.items()
        >= {
            "HOME": "/h",
            "OMP_NUM_THREADS": "2",
            "RANK": "1",
            "WORLD_SIZE": "4",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_IB_DISABLE": "1",
            "NCCL_RAS_ENABLE": "0",
            "NCCL_NVLS_ENABLE": "0",
            "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
            "NVSHMEM_DISABLE_NVLS": "1",
            "TMPDIR": str(tmp_path),
        }.items()
    )
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == found["PYTORCH_ALLOC_CONF"]
    assert "cudaMallocAsync" not in found["PYTORCH_ALLOC_CONF"]


def test_jobs_in_a_row_leave_memory_and_descriptors_flat(group):
    x = torch.zeros(1 << 18)
    places = lay_out({"frames": (torch.float32, (9, 256, 256, 3))})

    def jobs(count):
        for _ in range(count):
            group.run(Message("job", name="echo", tensors={"x": x}))
            with Segment.reserve(total_bytes(places)) as segment:
                group.run(Message("job", name="frames", placed=places, segment=segment))

    def usage():
        gc.collect()
        bodies = about(group)
        return (
            [psutil.Process().memory_info().rss, *(body["resident"] for body in bodies)],
            [len(open_files()), *(len(body["descriptors"]) for body in bodies)],
            threading.active_count(),
        )

    jobs(5)
    memory, descriptors, threads = usage()
    jobs(30)
    memory_after, descriptors_after, threads_after = usage()
    assert (descriptors_after, threads_after) == (descriptors, threads)
    # one job in thirty that kept its tensor would be 30 MiB
    assert all(now - then < 8 << 20 for then, now in zip(memory, memory_after, strict=True))


def test_a_request_that_cannot_be_sent_harms_nobody(group):
    generation = group.start()
    with pytest.raises(MessageError):
        group.run(Message("job", body={"x": object()}))
    assert about(group)
    assert group.generation == generation


# a stop --------------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    pass


@pytest.mark.parametrize("where", ["watch", "on_progress"])
def test_a_stop_ends_the_job_within_a_second_and_not_the_workers(group, where):
    generation, before = group.start(), pids(group)
    stop_at = time.monotonic() + 0.3
    late = []

    def stop(*event):
        if event:
            late.append(time.time() - event[1].body["at"])
        if time.monotonic() > stop_at:
            raise Stop

    with pytest.raises(Stop):
        group.run(Message("job", name="wait"), **{where: stop})
    assert time.monotonic() - stop_at < 1.0
    assert (group.generation, pids(group)) == (generation, before)
    # the usual event: a busy machine may hold up single ones
    assert not late or statistics.median(late) < 0.1


def test_a_worker_that_does_not_leave_the_job_is_ended(group):
    generation = group.start()

    def stop():
        raise Stop

    started = time.monotonic()
    with pytest.raises(Stop):
        group.run(Message("job", name="hang"), watch=stop)
    assert time.monotonic() - started < 5
    about(group)
    assert group.generation == generation + 1


def test_a_second_job_is_refused_while_one_runs(group):
    group.start()
    running, refused = threading.Event(), []

    def second():
        running.wait(5)
        try:
            group.run(Message("job", name="about"))
        except WorkersBusy as error:
            refused.append(error)

    thread = threading.Thread(target=second)
    thread.start()

    def on_progress(rank, message):
        running.set()
        if refused:
            raise Stop

    with pytest.raises(Stop):
        group.run(Message("job", name="wait"), on_progress=on_progress)
    thread.join()
    assert about(group)


# failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("refuse", "rank [01] failed in stage 'check': ValueError: 120 frames do not fit"),
        ("not_json", "rank [01] failed: MessageError: the body of result is not JSON"),
    ],
)
def test_an_error_that_all_ranks_have_leaves_the_workers(group, name, says):
    generation = group.start()
    with pytest.raises(WorkerError, match=says):
        group.run(Message("job", name=name))
    about(group)
    assert group.generation == generation


def test_an_error_of_one_rank_names_it_and_the_next_job_works(group):
    generation = group.start()
    old = pids(group)
    started = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 failed in stage 'sample': RuntimeError: out of memory") as caught:
        group.run(Message("job", name="fail", body={"rank": 1}))
    assert time.monotonic() - started < 5
    assert (caught.value.rank, caught.value.stage, caught.value.error) == (1, "sample", "RuntimeError")
    assert not any(map(alive, old))
    assert set(pids(group)).isdisjoint(old)
    assert group.generation == generation + 1


def test_a_killed_worker_is_an_error_at_once_and_the_next_job_works(group):
    generation = group.start()
    old = pids(group)
    killer = after(0.3, lambda: os.kill(old[1], signal.SIGKILL))
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1 failed in stage 'step \d+': was ended by SIGKILL"):
        group.run(Message("job", name="wait"))
    killer.join()
    assert time.monotonic() - started < 5
    assert not any(map(alive, old))
    with pytest.raises(StaleHandle, match=f"generation {generation} "):
        group.run(Message("job", name="about"), generation=generation)
    assert set(pids(group)).isdisjoint(old)
    assert group.run(Message("job", name="about"), generation=generation + 1)


def test_workers_whose_parents_end_closes_leave_and_the_next_job_has_fresh_ones(group):
    old, generation = pids(group), group.generation
    for worker in group._processes._workers:
        worker.channel.hang_up()
    assert wait_for(lambda: not any(map(alive, old)) and not group._processes.usable())
    with pytest.raises(StaleHandle):
        group.run(Message("job", name="about"), generation=generation)
    assert set(pids(group)).isdisjoint(old)


def test_malformed_messages_are_refused_and_the_worker_lives(group):
    before = pids(group)
    channel = group._processes._workers[0].channel
    channel.send_encoded((b"nonsense " * 1000, b""), None)
    channel.send(Message("progress", generation=group.generation))
    channel.send(Message("job", generation=group.generation + 1))
    events = [group._processes.events.get(timeout=5) for _ in range(2)]
    assert [(event.rank, event.message.kind) for event in events] == [(0, "refused")] * 2
    assert "begins with" in events[0].message.body["text"]
    assert group._processes.events.get(timeout=5).message.kind == "refused"
    assert pids(group) == before


def test_silent_workers_are_an_error_and_killed_when_nothing_else_ends_them(group):
    old = pids(group)
    stopper = after(0.3, lambda: os.kill(old[0], signal.SIGSTOP))
    started = time.monotonic()
    with pytest.raises(WorkerError, match="rank 0 failed in stage 'exchange': gave no sign for 1 s"):
        group.run(Message("job", name="hang"))
    stopper.join()
    assert time.monotonic() - started < 5
    assert not any(map(alive, old))


# the end -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def leftovers(monkeypatch):
    """What groups of this process have made."""

    def found():
        threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("ltx2 ")}
        return os.listdir(folder), threads, set(psutil.Process().children(recursive=True)), open_files()

    # with a short name, and away from those of other tests' processes
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield found


def test_close_leaves_nothing_and_handlers_can_say_farewell(group, leftovers, tmp_path):
    group.close()
    before = leftovers()
    other = WorkerGroup(Launch(1, ENTRY, {"FAREWELL": str(tmp_path)}, PATIENCE))
    other.start()
    assert leftovers() != before
    other.close()
    assert leftovers() == before
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    other.close()


def test_a_group_that_is_dropped_is_ended(leftovers):
    before = leftovers()
    group = WorkerGroup(Launch(1, ENTRY, patience=PATIENCE))
    group.start()
    assert leftovers() != before
    del group
    gc.collect()
    assert leftovers() == before


def test_workers_that_cannot_begin_are_an_error(leftovers):
    before = leftovers()
    group = WorkerGroup(Launch(1, ENTRY, {"FAIL_ON_RANK": "0"}, PATIENCE))
    with pytest.raises(WorkerError, match="rank 0 failed in stage 'start': RuntimeError: no such device"):
        group.start()
    assert leftovers() == before
    with pytest.raises(WorkerError, match="rank 0 failed in stage 'start': left with code 2"):
        WorkerGroup(Launch(1, ENTRY.with_name("absent.py"))).start()
    assert leftovers() == before


PARENT = f"""
    import sys, types
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [{str(ROOT)!r}]
    sys.modules["ltx2_engine"] = package
    from pathlib import Path
    from ltx2_engine.ltx2_core.parallel.messages import Message
    from ltx2_engine.ltx2_core.parallel.processes import Launch
    from ltx2_engine.ltx2_core.parallel.worker_group import WorkerGroup

    group = WorkerGroup(Launch(int(sys.argv[1]), Path({str(ENTRY)!r})))
    print(*[answer.body["pid"] for answer in group.run(Message("job", name="about"))], flush=True)
"""
# its workers hold the interpreter's lock: no thread of theirs sees that the parent is gone
RUN = """
    group.run(Message("job", name="hold_the_lock"), watch=lambda: print("running", flush=True))
"""


@pytest.fixture
def short_folder():
    """For what a killed parent cannot remove."""
    with tempfile.TemporaryDirectory(prefix="test-") as folder:
        yield folder


def test_no_worker_outlives_its_parent(short_folder):
    parents = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source), size],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": short_folder},
        )
        for source, size in ((PARENT, "1"), (PARENT + RUN, "2"))
    ]
    workers = [list(map(int, parent.stdout.readline().split())) for parent in parents]
    assert [len(pids) for pids in workers] == [1, 2]
    for _ in range(5):
        assert parents[1].stdout.readline() == "running\n"
    assert all(map(alive, workers[1]))
    parents[1].kill()
    for parent in parents:
        parent.wait(10)
        parent.stdout.close()
    assert wait_for(lambda: not any(map(alive, [*workers[0], *workers[1]])))
    assert [parent.returncode for parent in parents] == [0, -signal.SIGKILL]
