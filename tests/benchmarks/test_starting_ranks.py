"""ranks.py: what is told of ranks that fail, and that none is left."""

import os
import re
import signal
import threading
import time
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Nothing:
    """The job."""


@pytest.fixture
def ranks(module, monkeypatch, tmp_path):
    """The module, whose scripts are in ``tmp_path``."""
    found = module("ranks")
    monkeypatch.setattr(found, "HERE", tmp_path)
    return found


def script(folder, lines):
    header = "import os, pathlib, sys, time\nrank = os.environ['RANK']\nfolder = pathlib.Path(sys.argv[1])\n"
    (folder / "script.py").write_text(header + lines)
    return "script.py"


def test_answers_come_in_order_and_what_rank_0_said_is_shown(ranks, tmp_path, capfd):
    name = script(tmp_path, "print('this is', rank)\n(folder / f'{rank}.json').write_text('{\"rank\": %s}' % rank)")
    assert ranks.run_ranks(name, 2, Nothing()) == [{"rank": 0}, {"rank": 1}]
    assert re.fullmatch(r"script.py, 2 GPUs, took \d s:\n  this is 0\n", capfd.readouterr().out)


def test_a_rank_that_fails_is_told_with_the_end_of_its_log_and_ends_the_others(ranks, tmp_path):
    lines = (
        "time.sleep(60) if rank == '0' else None\n[print('line', i) for i in range(100)]\nsys.exit('no memory left')"
    )
    started = time.monotonic()
    with pytest.raises(SystemExit) as failed:
        ranks.run_ranks(script(tmp_path, lines), 2, Nothing())
    assert time.monotonic() - started < 30
    said = str(failed.value).splitlines()
    assert said[0] == "rank 1 of 2 failed (1):"
    assert said[-2:] == ["  line 99", "  no memory left"]
    assert len(said) == 41


def test_a_rank_without_a_word_is_told_by_its_number(ranks, tmp_path):
    with pytest.raises(SystemExit, match=r"^rank 0 of 1 failed \(-9\)$"):
        ranks.run_ranks(script(tmp_path, "os.kill(os.getpid(), 9)"), 1, Nothing())


def test_all_that_take_too_long_are_told(ranks, tmp_path):
    name = script(tmp_path, "print('begins', flush=True)\ntime.sleep(60)")
    with pytest.raises(SystemExit) as failed:
        ranks.run_ranks(name, 2, Nothing(), patience=3)
    said = "rank {} of 2 took more than 3 s:\n  begins"
    assert str(failed.value) == f"{said.format(0)}\n{said.format(1)}"


def test_ranks_of_a_stopped_benchmark_say_where_they_are_and_end(ranks, tmp_path):
    lines = "import faulthandler, signal\nfaulthandler.register(signal.SIGUSR1)\n"
    name = script(tmp_path, f"{lines}def deep():\n    time.sleep(60)\ndeep()")
    threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    with pytest.raises(SystemExit) as failed:
        ranks.run_ranks(name, 1, Nothing())
    assert time.monotonic() - started < 10
    said = str(failed.value)
    assert said.startswith("rank 0 of 1 was stopped:")
    assert "in deep" in said
