"""One video by ranks of a Ray cluster, which the command under test starts on this machine, or which there is."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from ltx2_engine import cli

from .lossless import contents, lossless
from .test_torchrun import GUIDED
from .waiting import wait_for

ROOT = Path(cli.__file__).parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra: ray)")


class Command:
    """``ltx2 run --ray``, in a session and with a folder for temporary files of its own."""

    def __init__(self, flow, *more, address="local"):
        # Ray has sockets there, whose paths may not be long
        self.temp = Path(tempfile.mkdtemp(dir="/tmp", prefix="lt"))
        self.events = []
        with (self.temp / "log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "cli.py"), "run", str(flow), "--ray", address, "--json", *map(str, more)],
                env=os.environ | {"TMPDIR": str(self.temp), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for process in [*self.started(), self._process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.communicate()
        shutil.rmtree(self.temp, ignore_errors=True)

    @property
    def log(self):
        return (self.temp / "log").read_text()

    def started(self):
        """The processes that there are because of this one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def ranks(self):
        return [one for one in self.started() if one.cmdline()[0].startswith("ray::Node")]

    def until_it_samples(self):
        for line in self._process.stdout:
            event = json.loads(line)
            self.events.append(event)
            if event["type"] == "progress" and event["total"] == STEPS and event["completed"] > 1:
                return
        raise AssertionError(self.log)

    def interrupt(self):
        """As Ctrl-C in a terminal does: all processes of the session's first group hear it."""
        os.killpg(self._process.pid, signal.SIGINT)

    def end(self):
        """The exit code and the last line."""
        out, _ = self._process.communicate(timeout=150)
        self.events += [json.loads(line) for line in out.splitlines()]
        return self._process.returncode, self.events[-1]


STEPS = 500


@pytest.fixture
def flow(tmp_path, tiny_prompt):
    """A function that writes a guided workflow of four passes and so many steps."""

    def write(steps):
        sigmas = {"schedule": "ltx-2", "steps": steps}
        prompt = tiny_prompt("text_to_video", LTX2EmptyLatent={"frames": 9}, LTX2Guider=GUIDED, LTX2Sigmas=sigmas)
        path = tmp_path / "flow.json"
        path.write_text(json.dumps(lossless(prompt)))
        return path

    return write


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def alone(tmp_path, tiny_models):
    """A function from a workflow to the files of one process that evaluates pass after pass."""

    def made(path):
        arguments = ["--models", str(tiny_models), "--set", "LTX2Guider.evaluation=split", "--disable-metadata"]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as an actor with one CPU has
        try:
            assert cli.main(["run", str(path), "--quiet", "--output", str(tmp_path / "alone"), *arguments]) == 0
        finally:
            torch.set_num_threads(threads)
        return contents(tmp_path / "alone")

    return made


def test_two_ranks_make_the_bits_of_one_process_and_overwrite_nothing(tmp_path, tiny_models, flow, alone):
    output, path = tmp_path / "out", flow(3)
    output.mkdir()
    (output / "frame_00007_.png").write_text("mine")
    arguments = ["--nodes", "2", "--models", tiny_models, "--disable-metadata", "--output", output]
    with Command(path, *arguments) as command:
        code, envelope = command.end()
        assert code == 0, command.log
        assert "topology 2x1 (groups x ranks of a group) of 4 passes" in command.log
        assert not list(command.temp.glob("ltx2-*"))

    made, expected = contents(output), alone(path)
    assert made.pop("frame_00007_.png") == b"mine"
    assert sorted(made) == [*(f"frame_{index:05}_.png" for index in range(8, 17)), "sound_00001_.flac"]
    assert [made[name] for name in sorted(made)] == [expected[name] for name in sorted(expected)]

    data = envelope["data"]
    assert data["executed_node_ids"][-2:] == ["90", "91"]
    assert data["outputs"] == [str(output / name) for name in sorted(made)]
    assert data["outputs"] == [event["path"] for event in command.events if event.get("type") == "output"]
    assert data["outputs_by_node"]["91"]["audio"][0]["filename"] == "sound_00001_.flac"


CLUSTER = """
from ray.cluster_utils import Cluster
machine = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 200_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
cluster.add_node(**machine)
print(cluster.address, flush=True)
input()
cluster.shutdown()
"""


@pytest.fixture
def cluster(monkeypatch):
    """The address of a cluster of two machines, which are none, with two GPUs each, which there are not."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate("\n", timeout=60)


def test_machines_of_a_cluster_take_a_process_a_gpu(tmp_path, tiny_models, flow, alone, cluster):
    path, arguments = flow(2), ["--models", tiny_models, "--disable-metadata", "--output", tmp_path / "out"]
    with Command(path, *arguments, "--gpus", "2", address=cluster) as command:
        code, _ = command.end()
        assert code == 0, command.log
        assert "4 ranks make the video, 2 on each of 2 machines" in command.log
        assert "topology 4x1 (groups x ranks of a group) of 4 passes" in command.log
    assert contents(tmp_path / "out") == alone(path)
    # apart means that one machine is not two
    with Command(path, *arguments, "--gpus", "1", "--nodes", "3", address=cluster) as command:
        code, envelope = command.end()
    assert code == 2
    assert "3 machines with 1 GPUs each were asked for" in envelope["error"]["message"]


def test_a_rank_that_dies_ends_all_and_is_named(tmp_path, tiny_models, flow):
    with Command(flow(STEPS), "--nodes", "2", "--models", tiny_models, "--output", tmp_path / "out") as command:
        command.until_it_samples()
        started, ranks = command.started(), command.ranks()
        assert len(ranks) == 2
        ranks[0].kill()
        code, envelope = command.end()
        assert code == 1, command.log
        assert "its process has ended" in envelope["error"]["message"]
        assert envelope["error"]["message"].startswith(("rank 0: ", "rank 1: "))
        wait_for(lambda: not any(map(is_alive, started)), 20)
    assert contents(tmp_path / "out") == {}


def test_an_interrupt_stops_all_ranks_and_leaves_nothing(tmp_path, tiny_models, flow):
    with Command(flow(STEPS), "--nodes", "2", "--models", tiny_models, "--output", tmp_path / "out") as command:
        command.until_it_samples()
        started, start = command.started(), time.monotonic()
        command.interrupt()
        code, envelope = command.end()
        assert code == 130, command.log
        assert envelope["error"]["code"] == "execution_interrupted"
        # the ranks take a second of it; Ray's own processes take their time
        assert time.monotonic() - start < 15
        wait_for(lambda: not any(map(is_alive, started)), 20)
        assert not list(command.temp.glob("ltx2-*"))
    assert contents(tmp_path / "out") == {}


def test_a_node_that_fails_is_reported_as_in_a_run_here(tmp_path):
    nodes = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 16384, "height": 16384, "batch_size": 4096, "color": 0}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    (tmp_path / "flow.json").write_text(json.dumps(nodes))
    with Command(tmp_path / "flow.json", "--nodes", "2", "--output", tmp_path / "out") as command:
        code, envelope = command.end()
        assert code == 1, command.log
    error = envelope["error"]
    assert "node 1 (EmptyImage): rank 0: 4096 pictures of 16384 x 16384 exceed" in error["message"]
    assert error["code"] == "execution_error"
    assert error["details"]["node_id"] == "1"
    assert error["details"]["exception_type"] == "ValueError"


def test_more_gpus_than_there_are_is_an_error(tmp_path, tiny_models, flow):
    with Command(flow(3), "--nodes", "2", "--gpus", "99", "--models", tiny_models, "--output", tmp_path) as command:
        code, envelope = command.end()
    assert code == 2
    assert "2 machines with 99 GPUs each were asked for (--nodes, --gpus); the machines" in envelope["error"]["message"]
