"""What crosses between machines, and jobs over workers that may die; the workers here are plain objects."""

import json

import numpy as np
import pytest
from ltx2_engine.ltx2_core.host import host
from ltx2_engine.nodes.runner import ray_nodes
from ltx2_engine.nodes.runner.job_queue import JobQueue
from ltx2_engine.nodes.runner.remote import Answer, RemoteNode, machine_text, pack, request_text, unpack
from ltx2_engine.nodes.runner.session import Folders, RunnerHost
from safetensors.numpy import save


class Act:
    """Saves its text, and fails or stops where the text says so."""

    RETURN_TYPES = ()
    FUNCTION = "go"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}

    @classmethod
    def go(cls, text):
        saved = host().save_path("out/act", "txt")
        saved.path.write_text(text)
        if text == "fail":
            raise RuntimeError("it broke")
        if text == "stop":
            host().interrupt()
            host().check_interrupt()
        return {"ui": {"files": [saved.ui()]}}


def flow(text):
    return json.dumps({"1": {"class_type": "Act", "inputs": {"text": text}}}).encode()


@pytest.fixture
def node(tmp_path):
    folders = Folders((tmp_path / "models",), tmp_path / "input")
    return RemoteNode(machine_text(folders, metadata=True), {"Act": Act})


def test_an_answer_has_the_files_and_nothing_stays_where_it_ran(node, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    answer = node.run(request_text("x", flow("one"), []))
    assert isinstance(answer, bytes)
    assert list((tmp_path / "temp").iterdir()) == []
    assert unpack(answer, tmp_path / "out") == Answer("done", files=("out/act_00001_.txt",))
    assert (tmp_path / "out" / "out" / "act_00001_.txt").read_text() == "one"


def test_settings_failures_and_stops_are_answers(node, tmp_path):
    def asked(data, settings=()):
        return unpack(node.run(request_text("x", data, settings)), tmp_path)

    assert asked(flow("one"), ["Act.text=fail"]) == Answer("failed", "node 1 (Act): it broke")
    assert asked(flow("stop")) == Answer("interrupted")
    assert "not valid JSON" in asked(b"{").reason
    assert "no node is called 'Z'" in asked(flow("one"), ["Z.text=1"]).reason
    assert asked(flow("two")).state == "done"


def test_an_empty_file_crosses_too(tmp_path):
    (tmp_path / "empty").touch()
    assert unpack(pack(Answer("done", files=("empty",)), tmp_path), tmp_path / "b").files == ("empty",)
    assert (tmp_path / "b" / "empty").read_bytes() == b""


def parts(facts=b'{"state": "done", "reason": ""}', **more):
    return save({"facts": np.frombuffer(facts, np.uint8), **more})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 64,
        parts()[:-4],
        save({"other": np.zeros(1, np.uint8)}),
        parts(b"["),
        parts(b'{"state": "well", "reason": ""}'),
        parts(b'{"state": "done", "reason": 3}'),
        parts(other=np.zeros(1, np.uint8)),
        parts(**{"file/a": np.zeros(1, np.float32)}),
        parts(**{"file/../a": np.zeros(1, np.uint8)}),
        parts(**{"file//etc/a": np.zeros(1, np.uint8)}),
    ],
)
def test_bytes_of_another_form_are_refused_and_nothing_is_written(tmp_path, data):
    with pytest.raises(ValueError, match=r"another form|must not hold|must be relative"):
        unpack(data, tmp_path / "x")
    assert not (tmp_path / "x").exists()


class FakeWorkers:
    """Workers that answer when they are asked to; those in ``deaths`` die with their first job."""

    def __init__(self, node, count, deaths=0):
        self.node, self.count, self.deaths = node, count, deaths
        self.replaced, self.most, self.stopped = [], 0, False

    def __len__(self):
        return self.count

    def submit(self, worker, request):
        assert isinstance(request, str)
        return (worker, request)

    def ended(self, running, seconds):
        self.most = max(self.most, len(running))
        return running[:1]

    def answer(self, ended):
        if self.deaths:
            self.deaths -= 1
            return None
        return self.node.run(ended[1])

    def replace(self, worker):
        self.replaced.append(worker)

    def stop(self, running):
        self.stopped = True


@pytest.fixture
def queue(tmp_path):
    return JobQueue.create(tmp_path / "queue")


def serve(queue, workers, stop_at=None):
    told, quiet = [], RunnerHost(progress="quiet")

    def report(outcome):
        told.append((outcome.job, outcome.state))
        if told[-1] == stop_at:
            quiet.interrupt()

    ray_nodes.serve(queue, workers, quiet, report)
    return told


def test_jobs_are_shared_out_and_the_job_of_a_dead_worker_runs_again(queue, node):
    jobs = [queue.add(flow(text), text) for text in ("one", "fail", "two", "three")]
    workers = FakeWorkers(node, 2, deaths=1)
    told = serve(queue, workers)
    assert workers.most == 2
    assert workers.replaced == [1]
    assert queue.names("failed") == [jobs[1]]
    assert queue.names("done") == [jobs[0], *jobs[2:]]
    assert told.count((jobs[0], "running")) == 2
    holders = (queue.root / "done" / jobs[0] / "holders.txt").read_text().split()
    assert len(holders) == 2
    assert (queue.root / "done" / jobs[2] / "output" / "out" / "act_00001_.txt").read_text() == "two"


def test_a_job_that_no_worker_survives_fails(queue, node):
    (job,) = [queue.add(flow("one"), "x")]
    serve(queue, FakeWorkers(node, 1, deaths=99))
    assert "3 workers went silent" in (queue.root / "failed" / job / "error.txt").read_text()


def test_a_stop_puts_all_jobs_back(queue, node):
    from ltx2_engine.ltx2_core.host import Interrupted

    jobs = [queue.add(flow("one"), "x") for _ in range(4)]
    workers = FakeWorkers(node, 3)
    with pytest.raises(Interrupted):
        serve(queue, workers, stop_at=(jobs[2], "running"))
    assert workers.stopped
    assert sorted((*queue.names("pending"), *queue.names("done"))) == jobs
    assert queue.names("running") == []


def test_without_ray_the_message_says_what_to_do(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ray_nodes.ClusterError, match=r"pip install 'ltx2-engine\[ray\]'"):  # noqa: SIM117
        with ray_nodes.workers(ray_nodes.Cluster("local"), Folders()):
            pass
