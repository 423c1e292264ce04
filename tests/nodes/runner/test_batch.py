"""``ltx2 batch``: one process that serves a queue, and several of which one is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from ltx2_engine import cli
from ltx2_engine.ltx2_core.host import host
from ltx2_engine.nodes.runner import batch
from ltx2_engine.nodes.runner.job_queue import JobQueue

from .lossless import contents, lossless
from .waiting import wait_for

ROOT = Path(cli.__file__).parent
# sums of another number of threads have other bits
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


class Act:
    """Writes a text as its output, and does what the test says meanwhile."""

    RETURN_TYPES = ()
    FUNCTION = "go"
    OUTPUT_NODE = True
    do = {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}

    @classmethod
    def go(cls, text):
        saved = host().save_path("out/act", "txt")
        saved.path.write_text(text)
        cls.do.get(text, lambda: None)()
        host().check_interrupt()
        return {"ui": {"files": [saved.ui()]}}


@pytest.fixture
def flows(tmp_path):
    """Writes workflows of one node, NAME.json with its text for each; returns their folder."""
    folder = tmp_path / "flows"
    folder.mkdir()

    def write(**texts):
        for name, text in texts.items():
            prompt = {"1": {"class_type": "Act", "inputs": {"text": text}}}
            (folder / f"{name}.json").write_text(json.dumps(prompt))
        return str(folder)

    Act.do.clear()
    return write


@pytest.fixture
def queue(tmp_path):
    return tmp_path / "queue"


def run(*arguments):
    return cli.main(["batch", *map(str, arguments)], nodes={"Act": Act})


def fail():
    raise RuntimeError("it broke")


def outputs(queue):
    """Job -> its files' texts."""
    return {
        job.name: [path.read_text() for path in sorted(job.glob("output/**/*.txt"))]
        for job in sorted((queue / "done").iterdir())
    }


def test_every_workflow_of_a_folder_runs_and_each_output_is_its_own(flows, queue, capsys):
    assert run(flows(b="two", a="one"), "--queue", queue, "--quiet") == 0
    assert outputs(queue) == {"00001_a": ["one"], "00002_b": ["two"]}
    assert capsys.readouterr() == ("", "")
    assert run("--join", queue) == 0
    assert capsys.readouterr().out == f"{queue}: 2 done\n"


def test_a_failed_job_says_why_and_the_next_goes_on(flows, queue, capsys):
    Act.do["bad"] = fail
    assert run(flows(a="bad", b="good"), "--queue", queue) == 1
    assert outputs(queue) == {"00002_b": ["good"]}
    assert (queue / "failed" / "00001_a" / "error.txt").read_text() == "node 1 (Act): it broke\n"
    assert list((queue / "work").iterdir()) == []
    shown = capsys.readouterr()
    assert "00001_a: failed" in shown.err
    assert "node 1 (Act): it broke" in shown.err
    assert shown.out.splitlines()[-1] == f"{queue}: 1 done, 1 failed"
    assert run("--join", queue) == 0, "old failures are not this run's"


def test_a_workflow_that_fits_no_node_fails_with_every_problem(queue, flows, tmp_path):
    folder = flows(a="one")
    (tmp_path / "flows" / "b.json").write_text('{"7": {"class_type": "Missing", "inputs": {}}}')
    assert run(folder, "--queue", queue, "--quiet") == 1
    assert "'Missing' not found" in (queue / "failed" / "00002_b" / "error.txt").read_text()


def test_settings_belong_to_the_jobs_that_were_added_with_them(flows, queue):
    folder = flows(a="one")
    assert run(folder, "--queue", queue, "--add-only", "--set", "Act.text=other") == 0
    assert run(folder, "--queue", queue, "--quiet") == 0
    assert outputs(queue) == {"00001_a": ["other"], "00002_a": ["one"]}
    assert run(folder, "--queue", queue, "--quiet", "--set", "9.text=x") == 1
    assert "no node is called '9'" in (queue / "failed" / "00003_a" / "error.txt").read_text()


def test_json_is_one_line_for_each_beginning_and_end(flows, queue, capsys):
    assert run(flows(a="one"), "--queue", queue, "--json") == 0
    begun, done, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (begun["type"], begun["job"], begun["state"]) == ("job", "00001_a", "running")
    assert (done["job"], done["state"]) == ("00001_a", "done")
    assert done["files"] == [str(queue / "done" / "00001_a" / "output" / "out" / "act_00001_.txt")]
    assert (last["type"], last["done"], last["failed"]) == ("queue", 1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--join", "{queue}"], "is no queue"),
        (["--join", "{queue}", "{flows}"], "--join only runs"),
        (["--join", "{queue}", "--set", "1.text=x"], "--join only runs"),
        (["{queue}/nothing.json", "--queue", "{queue}"], "cannot be read"),
        (["{empty}", "--queue", "{queue}"], "no file in it ends in .json"),
        (["{flows}", "--queue", "{flows}"], "not an empty folder"),
        (["{flows}", "--queue", "{queue}", "--expiry", "0"], "1 to 86400 seconds"),
        (["{flows}", "{ui}", "--queue", "{queue}"], "UI format"),
    ],
)
def test_what_cannot_be_asked_for_exits_2_and_adds_nothing(flows, queue, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "ui.json").write_text('{"nodes": []}')
    places = {"queue": queue, "flows": flows(a="one"), "empty": tmp_path / "empty", "ui": tmp_path / "ui.json"}
    assert run(*(one.format(**places) for one in arguments)) == 2
    assert message in capsys.readouterr().err
    assert not queue.exists()


def test_an_expiry_is_that_of_the_queue(flows, queue, capsys):
    folder = flows(a="one")
    assert run(folder, "--queue", queue, "--expiry", "30", "--quiet") == 0
    assert run(folder, "--queue", queue, "--expiry", "30", "--quiet") == 0
    assert run(folder, "--queue", queue, "--expiry", "60") == 2
    assert "was made with --expiry 30" in capsys.readouterr().err
    assert len(outputs(queue)) == 2


def test_a_queue_that_goes_away_ends_the_run(flows, queue, capsys):
    Act.do["one"] = lambda: shutil.rmtree(queue)
    assert run(flows(a="one"), "--queue", queue) == 1
    assert "the queue cannot be reached" in capsys.readouterr().err


def test_stop_puts_the_job_back_unblamed(flows, queue, capsys):
    Act.do["stop"] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert run(flows(a="stop", b="two"), "--queue", queue) == 130
    assert "00001_a: returned" in capsys.readouterr().out
    assert sorted(path.name for path in (queue / "pending").iterdir()) == ["00001_a", "00002_b"]
    assert (queue / "pending" / "00001_a" / "holders.txt").read_text() == ""
    assert list((queue / "work").iterdir()) == list((queue / "running").iterdir()) == []
    Act.do.clear()
    assert run("--join", queue, "--quiet") == 0
    assert outputs(queue) == {"00001_a": ["stop"], "00002_b": ["two"]}


def test_a_job_that_was_taken_meanwhile_is_stopped_and_not_published(flows, queue, capsys):
    def taken():
        Act.do.clear()
        other = JobQueue.open(queue)
        (held,) = (queue / "running").iterdir()
        os.utime(held / "workflow.json", (0, 0))
        assert other.expire() == ["00001_a"]
        claim = other.claim()
        claim.begin()
        (claim.work / "by.txt").write_text("the other")
        claim.commit()
        limit = time.monotonic() + 20
        while time.monotonic() < limit:
            host().check_interrupt()
            time.sleep(0.01)

    Act.do["slow"] = taken
    assert run(flows(a="slow", b="two"), "--queue", queue, "--expiry", "1") == 0
    assert "00001_a: lost" in capsys.readouterr().out
    assert outputs(queue) == {"00001_a": ["the other"], "00002_b": ["two"]}
    assert list((queue / "work").iterdir()) == []


def test_a_name_cannot_lead_out_of_the_jobs_output(queue, tmp_path, capsys):
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "../../x"}},
    }
    (tmp_path / "a.json").write_text(json.dumps(prompt))
    assert run(tmp_path / "a.json", "--queue", queue) == 1
    assert "'..'" in (queue / "failed" / "00001_a" / "error.txt").read_text()
    assert list(tmp_path.rglob("*.png")) == []


def test_jobs_of_one_model_find_it_loaded(queue, tmp_path, tiny_models, tiny_prompt, monkeypatch):
    from ltx2_engine.ltx2_core import handles

    opened = []
    monkeypatch.setattr(handles, "open_files", lambda spec, real=handles.open_files: opened.append(spec) or real(spec))
    for seed in (1, 2):
        prompt = tiny_prompt("text_to_video", LTX2Sampler={"seed": seed}, LTX2EmptyLatent={"frames": 9})
        (tmp_path / f"{seed}.json").write_text(json.dumps(prompt))
    arguments = ["batch", str(tmp_path), "--queue", str(queue), "--models", str(tiny_models), "--quiet"]
    assert cli.main(arguments) == 0
    assert len(opened) == 1
    assert len(list((queue / "done").rglob("*.mp4"))) == 2


# processes -----------------------------------------------------------------------------------------------------------


def node_of(queue, models):
    """A process that serves the queue, as another machine would."""
    command = [sys.executable, str(ROOT / "cli.py"), "batch", "--join", str(queue), "--models", str(models), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)


def test_a_killed_node_s_job_runs_again_and_every_output_is_there_once(queue, tmp_path, tiny_models, tiny_prompt):
    """Two processes serve one queue and one of them is killed in the middle of a job; the bits are those of one process."""
    made = JobQueue.create(queue, expiry=3)
    for seed in range(4):
        flow = tmp_path / f"{seed}.json"
        prompt = tiny_prompt("text_to_video", LTX2Sampler={"seed": seed}, LTX2EmptyLatent={"frames": 9})
        flow.write_text(json.dumps(lossless(prompt)))
        made.add(flow.read_bytes(), flow.stem)

    nodes = [node_of(queue, tiny_models) for _ in range(2)]
    try:
        victim, other = nodes
        # a folder to write into is the last that a claim gets before its job runs
        (work,) = wait_for(lambda: [path for path in (queue / "work").iterdir() if f"-{victim.pid}-" in path.name])
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        interrupted = work.name.partition("@")[0]
        assert (queue / "running" / work.name).is_dir(), "it was killed in the middle of its job"
        out, log = other.communicate(timeout=100)
    finally:
        for node in nodes:
            node.kill()
            node.wait()
            node.stdout.close()
            node.stderr.close()

    assert other.returncode == 0, log
    ended = Counter(event["job"] for event in map(json.loads, out.splitlines()) if event.get("state") == "done")
    assert set(ended.values()) == {1}
    jobs = sorted(path.name for path in (queue / "done").iterdir())
    assert jobs == [f"0000{seed + 1}_{seed}" for seed in range(4)]
    # nine frames and a sound
    assert [len(contents(queue / "done" / job / "output")) for job in jobs] == [10] * 4
    assert len((queue / "done" / interrupted / "holders.txt").read_text().split()) == 2, "it was run again"
    assert "gave no sign of life" in log
    for folder in ("pending", "running", "failed", "work"):
        assert list((queue / folder).iterdir()) == []

    alone = tmp_path / "alone"
    flow = str(tmp_path / f"{interrupted[-1]}.json")
    options = ["--models", str(tiny_models), "--output", str(alone), "--quiet"]
    subprocess.run([sys.executable, str(ROOT / "cli.py"), "run", flow, *options], check=True, env=ONE_THREAD)
    assert contents(queue / "done" / interrupted / "output") == contents(alone)


def test_waiting_for_more_jobs_ends_with_a_stop(flows, queue):
    assert batch.POLL <= 1, "a stop is heard soon"
    JobQueue.create(queue)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "batch", "--join", str(queue), "--wait", "--quiet"]
    )
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    assert process.wait(20) == 130
