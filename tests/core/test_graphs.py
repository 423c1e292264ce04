"""How an evaluation is cut into graphs and how far the host runs ahead, without a device; what graphs compute, on one."""

import itertools
import threading
import time

import pytest
import torch
from ltx2_engine.ltx2_core import graphs
from ltx2_engine.ltx2_core.graphs import Recording, RunAhead
from ltx2_engine.ltx2_core.parallel.context import SINGLE, ParallelContext


class Tape:
    """Stands in for graphs: what was begun, ended and dropped."""

    def __init__(self):
        self.log = []
        self._numbers = itertools.count()

    def begin(self):
        tape, number = self, next(self._numbers)
        tape.log.append(f"begin {number}")

        class Graph:
            def end(self):
                tape.log.append(f"end {number}")

            def drop(self):
                tape.log.append(f"drop {number}")

        return Graph()


@pytest.mark.parametrize(("blocks", "graphs"), [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_every_so_many_blocks_are_one_graph(blocks, graphs):
    tape = Tape()
    with Recording(tape.begin, 2, lambda: None) as recording:
        for _ in range(blocks):
            recording.on_block()
    assert len(recording.graphs) == graphs
    assert tape.log == [f"{what} {number}" for number in range(graphs) for what in ("begin", "end")]


def test_what_fails_inside_a_capture_drops_it():
    tape = Tape()

    def evaluate():
        with Recording(tape.begin, 1, lambda: None) as recording:
            recording.on_block()
            recording.on_block()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    assert tape.log == ["begin 0", "end 0", "begin 1", "drop 1"]


def test_a_capture_can_be_stopped():
    tape = Tape()

    def check():
        if len(tape.log) == 3:
            raise KeyboardInterrupt

    def evaluate():
        with Recording(tape.begin, 1, check) as recording:
            for _ in range(9):
                recording.on_block()

    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert tape.log == ["begin 0", "end 0", "begin 1", "drop 1"]


class Event:
    def __init__(self):
        self.happened = False

    def query(self):
        return self.happened


def test_the_host_is_only_so_far_ahead():
    events = []

    def record():
        events.append(Event())
        return events[-1]

    ahead = RunAhead(2, record)
    for _ in range(3):
        ahead.wait(lambda: None)
        ahead.enqueued()
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (ahead.wait(lambda: None), done.set()))
    waiting.start()
    assert not done.wait(0.05)
    events[0].happened = True
    assert done.wait(10)
    waiting.join()


def test_a_stop_is_heard_while_the_host_waits():
    ahead, calls = RunAhead(0, Event), []
    ahead.enqueued()

    def check():
        calls.append(time.perf_counter())
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ahead.wait(check)


def test_other_devices_have_no_graphs(monkeypatch):
    assert not graphs.can_capture(torch.device("cpu"))
    monkeypatch.setenv("LTX2_GRAPHS", "off")
    assert not graphs.can_capture(torch.device("cuda:0"))


def test_an_allocator_without_pools_is_named(monkeypatch, caplog):
    monkeypatch.delenv("LTX2_GRAPHS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    graphs._allocator_can.cache_clear()
    with caplog.at_level("INFO", logger="ltx2.engine"):
        assert not graphs.can_capture(torch.device("cuda:0"))
        assert not graphs.can_capture(torch.device("cuda:0"))
    graphs._allocator_can.cache_clear()
    assert caplog.text.count("--disable-cuda-malloc") == 1


class Others:
    """The other ranks' answers."""

    def __init__(self, *answers):
        self.answers = answers

    def all_gather(self, x):
        return torch.stack([x, *(torch.full_like(x, answer) for answer in self.answers)])


@pytest.mark.parametrize(
    ("here", "there", "all_fine"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_ranks_that_share_tokens_capture_together_or_not_at_all(here, there, all_fine):
    parallel = ParallelContext(0, 2, Others(there))
    assert parallel.agree(here, torch.device("cpu")) is all_fine
    assert SINGLE.agree(here, torch.device("cpu")) is here
