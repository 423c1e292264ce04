"""Components on tiny checkpoints: switched between LoRAs."""

import random

import pytest
from ltx2_engine.ltx2_core import component as component_module
from ltx2_engine.ltx2_core.component import Component
from ltx2_engine.ltx2_core.handles import ModelHandle, open_engine
from ltx2_engine.ltx2_core.host import Interrupted, use_host
from ltx2_engine.ltx2_core.loading import store as store_module
from ltx2_engine.ltx2_core.standalone import StandaloneHost

from .shared import (
    AB,
    HALF_A,
    LISTS,
    NONE,
    PLAIN,
    POLICIES,
    VIDEO_A,
    WAYS,
    A,
    Machine,
    interrupting,
    memory,
    sampled,
    transformer_of,
    watched,
    without_collector,
)


@pytest.mark.parametrize(("name", "format"), WAYS)
def test_lists_in_any_order_give_the_bits_of_a_fresh_engine(network, policy, name, format):
    policy(name)
    one = network(format)
    order = [*LISTS, *random.Random(name + format).choices(LISTS, k=5), NONE]
    for loras in order:
        assert one.holds(loras), (loras, order)
    results = {loras: one.result(loras)[0] for loras in LISTS}
    assert len(set(results.values())) == len(LISTS), "lists that should differ do not"


def test_handles_of_one_model_share_its_weights_and_keep_their_lists(spec, fresh, context):
    base = ModelHandle(spec(), open_engine(spec()))
    paths = {name: spec(loras=((name, 1.0, 1.0, 1.0),)).loras[0].path for name in ("a", "b")}
    handles = {NONE: base, A: base.with_lora(paths["a"], 1.0), HALF_A: base.with_lora(paths["a"], 0.5)}
    handles[AB] = handles[A].with_lora(paths["b"], 0.6)
    handles[VIDEO_A] = base.with_lora(paths["a"], 1.0, audio=0.0)
    assert len({id(transformer_of(one.engine)) for one in handles.values()}) == 1
    want = {loras: sampled(fresh(loras=loras), context) for loras in handles}
    order = [*handles, *random.Random(0).choices(list(handles), k=8)]
    for loras in order:
        assert sampled(handles[loras].engine, context) == want[loras], (loras, order)


def test_a_pair_switches_without_reading(network, policy, reads):
    policy("pair")
    one = network()
    base = one.result()
    merged = one.result(A)
    reads.bytes.clear()
    for _ in range(2):
        assert one.result() == base
        assert one.result(A) == merged
    assert sum(reads.bytes.values()) == 0
    one.result(HALF_A)
    assert set(reads.bytes) == {"a.safetensors"}, "the base was read again"


def test_bases_in_host_memory_are_read_once(network, policy, reads):
    policy("pinned")
    one = network()
    base = one.result()
    one.result(A)
    one.component._keeping.join()
    reads.bytes.clear()
    assert one.result() == base
    assert sum(reads.bytes.values()) == 0
    half = one.result(HALF_A)
    assert set(reads.bytes) == {"a.safetensors"}, "the base was read again"
    assert one.holds(HALF_A)
    assert one.result(HALF_A) == half


def test_a_switch_stops_the_keeping_and_takes_its_memory_back(network, wanted, policy, reads, monkeypatch):
    policy("pinned")
    keep, stop_keeping = Component._keep, Component._stop_keeping

    def without_end(component):
        reads.gate.clear()
        keep(component)

    def stop(component):
        if component._keeping is not None:
            component._keeping._stop.set()
        reads.gate.set()
        stop_keeping(component)

    monkeypatch.setattr(Component, "_keep", without_end)
    monkeypatch.setattr(Component, "_stop_keeping", stop)
    reads.waits = lambda name, offset: name == "plain.safetensors"
    one = network()
    order = (HALF_A, AB, A, HALF_A, A)
    results = []
    for loras in order:
        results.append(one.result(loras))
        assert not one.component._keeping.join(0), "nothing was being kept"
    assert len(one.component._kept) == 1
    reads.gate.set()
    one.component._keeping.join()
    reads.bytes.clear()
    one.result(HALF_A)
    assert set(reads.bytes) == {"a.safetensors"}
    reads.gate.set()
    policy("file")
    for loras, result in zip(order, results, strict=True):
        assert network().holds(loras)
        assert result == wanted[PLAIN, loras, "file"]


def test_memory_does_not_grow_with_switches(network, policy, no_shared_memory):
    for name in POLICIES:
        policy(name)
        one = network()
        sizes = []
        for _ in range(4):
            for loras in (A, NONE, AB, HALF_A):
                one.result(loras)
                if one.component._keeping is not None:
                    one.component._keeping.join()
            sizes.append((one.component.bytes_on("cpu"), memory()))
        assert len(set(sizes[1:])) == 1, (name, sizes)
        one.component.close()


def test_a_switch_that_is_stopped_leaves_nothing_for_the_collector(network, policy, reads, monkeypatch):
    policy("file")
    monkeypatch.setattr(store_module, "_GROUP_BYTES", 100_000)
    one = network()
    one.result(AB)
    with use_host(StandaloneHost(progress="quiet")) as standalone, without_collector():
        thread = interrupting(standalone, reads)
        with pytest.raises(Interrupted):
            one.result(HALF_A)
        thread.join()
        assert one.component._store.complete
        found = watched(one.component)
        assert one.component.release("cpu", None) > 0
        assert [one for one in found if one() is not None] == []


def test_forgetting_the_bases_gives_their_memory_back(network, policy, no_shared_memory):
    for name in ("pair", "pinned"):
        policy(name)
        one = network()
        one.result(A)
        if one.component._keeping is not None:
            one.component._keeping.join()
        held, before = one.component.bytes_on("cpu"), memory()
        freed = one.component.release("cpu", 1)
        assert freed > 1 << 20
        assert one.component.bytes_on("cpu") == held - freed
        assert one.component._reached is not None, "the weights went too"
        assert memory() <= before - 0.9 * freed, name
        assert one.holds(A)
        assert one.holds()
        one.component.close()


def test_the_way_back_counts_what_is_still_to_be_loaded(network, monkeypatch):
    """The room for bases is what the loaded network and its work leave."""
    asked = []

    def choose(touched, work, *, device_free, host_free):
        asked.append(device_free)
        return "file"

    monkeypatch.setattr(component_module, "choose_policy", choose)
    one = network()
    with use_host(Machine(0, host=100 << 20)):
        one.result(A)
    one.component.close()
    with use_host(Machine(0, host=100 << 20)) as machine:
        one.result()
        one.result(A)
        assert machine.free_bytes("cpu") == (100 << 20) - one.component.full_bytes
    assert asked == [(100 << 20) - one.component.full_bytes] * 2
