"""Components on tiny checkpoints: stopped anywhere while they are read, and given up."""

import contextlib
import gc
import threading
import time
import weakref

import pytest
from ltx2_engine.ltx2_core.handles import open_engine
from ltx2_engine.ltx2_core.host import Interrupted, host, use_host
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError
from ltx2_engine.ltx2_core.standalone import StandaloneHost

from .shared import (
    Machine,
    Reads,
    encoded,
    memory,
    places,
    running,
    sampled,
    transformer_of,
    until,
    watched,
    without_collector,
)


def test_an_interrupt_gives_control_and_memory_back_within_a_second(fresh, reads, context):
    engine = fresh()
    want = sampled(engine, context)
    engine.close()
    component = transformer_of(engine)
    before = memory()
    reads.seconds = 0.05
    found, times = [], []

    def interrupt(standalone):
        until(lambda: component.bytes_on("cpu") > 100_000)
        found.extend(watched(component))
        times.append(time.monotonic())
        standalone.interrupt()

    with use_host(StandaloneHost(progress="quiet")) as standalone, without_collector():
        thread = threading.Thread(target=interrupt, args=(standalone,))
        thread.start()
        with pytest.raises(Interrupted):
            component.use(0)
        took = time.monotonic() - times[0]
        thread.join()
        assert took < 1
        assert running() == []
        assert len(found) > 10
        assert [one for one in found if one() is not None] == []
        reads.seconds = 0.0
        assert component.bytes_on("cpu") == 0
        assert memory() <= before
        assert sampled(engine, context) == want


class Unseen(StandaloneHost):
    """The node's thread takes the interrupt before any other sees it."""

    def interrupted(self):
        return False


@pytest.mark.parametrize("kind", [StandaloneHost, Unseen])
def test_an_interrupt_while_the_first_of_two_is_read_stops_both(fresh, reads, context, kind):
    engine = fresh()
    reads.seconds = 0.05
    with use_host(kind(progress="quiet")) as standalone:
        engine.start()
        until(lambda: engine._text_encoder.bytes_on("cpu") > 0)
        standalone.interrupt()
        started = time.monotonic()
        with pytest.raises(Interrupted):
            encoded(engine)
        assert time.monotonic() - started < 1
        until(lambda: running() == [], 1.0)
        reads.seconds = 0.0
        encoded(engine)
        assert sampled(engine, context) == sampled(fresh(), context)


class Flagged(StandaloneHost):
    """As in ComfyUI: the flag can be seen without being taken back, and the exception is the host's own."""

    class Stopped(BaseException):
        pass

    def check_interrupt(self):
        if self._stop.is_set():
            self._stop.clear()
            raise self.Stopped


def test_the_hosts_own_exception_is_raised_also_where_the_thread_saw_the_flag_first(fresh, reads):
    engine = fresh()
    component = transformer_of(engine)
    with use_host(Flagged(progress="quiet")) as flagged:
        component.start(0)
        flagged.interrupt()
        until(lambda: component._loading.join(0))
        reads.order.clear()
        with pytest.raises(Flagged.Stopped):
            component.use(0)
        assert not flagged.interrupted()
        assert reads.order == [], "it began again"


def test_a_reading_that_an_earlier_interrupt_stopped_begins_again(fresh, reads, context):
    """The flag is taken back elsewhere: the next run is none of its business."""
    engine = fresh()
    want = sampled(fresh(), context)
    component = transformer_of(engine)
    reads.seconds = 0.01
    with use_host(Flagged(progress="quiet")) as flagged:
        component.start(0)
        until(lambda: component.bytes_on("cpu") > 0)
        flagged.interrupt()
        until(lambda: component._loading.join(0))
        with pytest.raises(Flagged.Stopped):
            flagged.check_interrupt()
        reads.seconds = 0.0
        assert sampled(engine, context) == want


@pytest.mark.parametrize("landed", [False, True])
def test_the_last_handle_that_goes_stops_its_threads(spec, reads, landed):
    engine = open_engine(spec())
    component, encoder = transformer_of(engine), engine._text_encoder
    reads.seconds = 0.02
    engine.start()
    until(lambda: (component if landed else encoder).bytes_on("cpu") > 0)
    found = [*watched(component), *watched(encoder)]
    with without_collector():
        del engine
        assert running() == []
        assert [one for one in found if one() is not None] == []
    assert component.bytes_on("cpu") == 0
    assert not any(one is component for one in host()._residents)


def test_an_engine_that_the_collector_finds_in_a_reading_thread_stops_too(spec, reads):
    """An engine in a circle of references, as a traceback makes them, goes wherever the collector runs."""
    collected = threading.Event()

    def collect(name, offset):
        if not collected.is_set() and dropped.is_set():
            gc.collect()
            collected.set()
        return False

    dropped = threading.Event()
    reads.fails = collect
    reads.seconds = 0.01
    with without_collector():
        engine = open_engine(spec())
        component = transformer_of(engine)
        component.start(0)
        circle = [engine]
        circle.append(circle)
        until(lambda: component.bytes_on("cpu") > 0)
        del engine, circle
        dropped.set()
        until(collected.is_set)
        until(lambda: running() == [], 3.0)
    assert component.bytes_on("cpu") == 0


@pytest.mark.parametrize("landed", [False, True])
@pytest.mark.parametrize("way", ["release", "close"])
def test_giving_memory_back_stops_the_reading(fresh, reads, context, way, landed):
    engine = fresh()
    component = transformer_of(engine)
    reads.seconds = 0.02
    if landed:
        component.start(0)
        until(lambda: component.bytes_on("cpu") > 0)
    else:
        reads.gate.clear()
        component.start(0)
        threading.Timer(0.05, reads.gate.set).start()
    found = watched(component)
    with without_collector():
        if way == "close":
            component.close()
        else:
            component.release("cpu", None)
        assert running() == []
        assert [one for one in found if one() is not None] == []
    assert component.bytes_on("cpu") == component.pending_bytes == 0
    reads.seconds = 0.0
    assert sampled(engine, context) == sampled(fresh(), context)


def test_a_host_that_needs_room_stops_the_reading(fresh, reads, context):
    engine = fresh()
    component = transformer_of(engine)
    reads.seconds = 0.02
    with use_host(Machine(0, host=4 << 20)) as machine:
        component.start(0)
        until(lambda: component.bytes_on("cpu") > 0)
        machine.admit(engine._networks["video_encoder"], "cpu", 4 << 20, 0)
        assert running() == []
        assert component.bytes_on("cpu") == 0


def test_an_error_leaves_nothing_behind_for_the_collector(fresh, reads):
    """Of the network, and of what its users had at hand."""
    engine = fresh()
    component = transformer_of(engine)
    component._the_store()
    end = places(engine)
    reads.fails = lambda name, offset: end(name, offset) and len(reads.order) > 150
    found = [weakref.ref(component._store.module)]

    def use():
        mine = Reads(None)
        found.append(weakref.ref(mine))
        component.use(0)

    with without_collector():
        with contextlib.suppress(CheckpointError):
            use()
            raise AssertionError("nothing failed")
        assert [one for one in found if one() is not None] == []


def test_an_error_that_is_kept_keeps_no_weights(fresh, reads, no_shared_memory):
    """Hosts keep the last error for their log."""
    engine = fresh()
    component = transformer_of(engine)
    end = places(engine)
    reads.fails = lambda name, offset: end(name, offset) and len(reads.order) > 150
    before = memory()
    with pytest.raises(CheckpointError) as kept:
        component.use(0)
    assert memory() <= before
    assert kept.value.__traceback__ is not None
