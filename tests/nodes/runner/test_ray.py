"""Whole jobs over a Ray cluster with two workers, started on this machine by the command under test."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from ltx2_engine import cli
from ltx2_engine.nodes.runner.job_queue import JobQueue

from .lossless import contents, lossless
from .waiting import wait_for

ROOT = Path(cli.__file__).parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra: ray)")


def workers_of(process):
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if command.startswith("ray::") and "Node" in command:
            found.append(child)
    return found


def test_two_workers_make_the_bits_of_one_process_and_a_killed_one_s_job_runs_again(tmp_path, tiny_models, tiny_prompt):
    queue = tmp_path / "queue"
    made = JobQueue.create(queue)
    for seed in range(3):
        prompt = tiny_prompt("text_to_video", LTX2Sampler={"seed": seed}, LTX2EmptyLatent={"frames": 9})
        (tmp_path / f"{seed}.json").write_text(json.dumps(lossless(prompt)))
        made.add((tmp_path / f"{seed}.json").read_bytes(), str(seed))
    command = [sys.executable, str(ROOT / "cli.py"), "batch", "--join", str(queue), "--ray", "local", "--nodes", "2"]
    driver = subprocess.Popen(
        [*command, "--models", str(tiny_models), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: len(list((queue / "running").iterdir())) == 2)
        victim = wait_for(lambda: [one for one in workers_of(driver) if ".run" in " ".join(one.cmdline())])[0]
        victim.kill()
        out, log = driver.communicate(timeout=300)
    finally:
        driver.kill()
        driver.wait()

    assert driver.returncode == 0, log
    states = [(event["job"], event["state"]) for event in map(json.loads, out.splitlines()) if event["type"] == "job"]
    assert sum(state == "returned" for _, state in states) == 1, "one was killed in the middle of its job"
    assert (
        sorted(job for job, state in states if state == "done")
        == made.names("done")
        == ["00001_0", "00002_1", "00003_2"]
    )

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as an actor with one CPU has
    try:
        for seed in range(3):
            arguments = ["run", str(tmp_path / f"{seed}.json"), "--models", str(tiny_models), "--quiet"]
            assert cli.main([*arguments, "--output", str(tmp_path / f"alone-{seed}")]) == 0
    finally:
        torch.set_num_threads(threads)
    for seed, job in enumerate(made.names("done")):
        assert contents(queue / "done" / job / "output") == contents(tmp_path / f"alone-{seed}")


def test_more_gpus_than_there_are_is_an_error(tmp_path):
    queue = str(tmp_path / "queue")
    JobQueue.create(Path(queue))
    command = [sys.executable, str(ROOT / "cli.py"), "batch", "--join", queue, "--ray", "local", "--gpus", "99"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert "1 workers with 99 GPUs each were asked for; the cluster has" in done.stderr
