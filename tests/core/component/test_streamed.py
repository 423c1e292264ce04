"""Components on tiny checkpoints: streamed from host memory."""

import random
import weakref

import pytest
from ltx2_engine.ltx2_core.host import Interrupted, use_host
from ltx2_engine.ltx2_core.standalone import StandaloneHost

from .shared import (
    AB,
    BLOCKS,
    FORMATS,
    HALF_A,
    LAYERS,
    LISTS,
    NONE,
    VIDEO_A,
    WAYS,
    A,
    arena_ranges,
    hidden_states,
    interrupting,
    lies_in,
    memory,
    watched,
    without_collector,
)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("streamed", [1, 2, BLOCKS])
def test_a_streamed_transformer_gives_the_bits_of_a_resident_one(network, policy, format, streamed):
    policy("file")
    one = network(format)
    for loras in (NONE, A, AB, NONE, VIDEO_A):
        assert one.holds(loras, streamed=streamed), loras
    assert one.component._stream.copies > 0


@pytest.mark.parametrize("streamed", [1, LAYERS // 2, LAYERS])
def test_a_streamed_text_encoder_gives_the_bits_of_a_resident_one(fresh, streamed):
    engine = fresh()
    want = hidden_states(engine, engine._text_encoder.use(0))
    for count in (streamed, 0, streamed):
        assert hidden_states(engine, engine._text_encoder.use(0, streamed=count)) == want
    assert engine._text_encoder._stream.copies >= streamed
    engine._text_encoder.close()
    assert hidden_states(engine, engine._text_encoder.use(0, streamed=streamed)) == want


@pytest.mark.parametrize(("name", "format"), WAYS)
def test_lists_and_streamed_counts_in_any_order(network, policy, name, format):
    policy(name)
    one = network(format)
    choice = random.Random(f"{name} {format}")
    steps = [(A, 0), (A, 2), (NONE, 2), (A, 2), (A, 0), (NONE, 0)]
    steps += [(choice.choice(LISTS), choice.randrange(BLOCKS + 1)) for _ in range(6)]
    for number, (loras, streamed) in enumerate(steps):
        assert one.holds(loras, streamed=streamed), steps[: number + 1]
        assert not streamed or one.component._store.pristine.policy in (None, "file"), "merging in arenas takes no room"


def test_the_way_back_is_decided_anew_where_blocks_lie_elsewhere(network, policy, reads):
    policy("pair")
    one = network()
    base, merged = one.result(), one.result(A)
    assert one.result(A, BLOCKS)[0] == merged[0]
    assert one.component._kept_bytes() == 0, "bases lie on the device beside blocks that do not"
    assert one.result(HALF_A, 0) != merged
    assert one.result(A, 0) == merged
    reads.bytes.clear()
    assert one.result() == base
    assert sum(reads.bytes.values()) == 0, "it is no pair again"


def test_weights_made_dense_for_a_lora_stream_too(network, policy):
    policy("file")
    one = network("nvfp4")
    dora = (("dora", 0.8, 1.0, 1.0),)
    for loras, streamed in ((dora, 2), (NONE, 2), (dora, 3), (dora, 0), (NONE, 1)):
        assert one.holds(loras, streamed=streamed), (loras, streamed)


@pytest.mark.parametrize(("name", "format"), WAYS)
def test_what_does_not_stream_lies_on_the_device_and_what_streams_in_arenas(network, policy, name, format):
    """Of every tensor, branches included: on a GPU the others would be on the wrong device."""
    policy(name)
    one = network(format)
    for loras, streamed in ((A, 2), (NONE, 2), (A, 2), (A, 0), (A, 1), (NONE, 0), (A, 3)):
        one.result(loras, streamed)
        inside = arena_ranges(one.component)
        blocks = one.component._store.module.blocks
        assert len(inside) == streamed
        for number, block in enumerate(blocks):
            streams = number in one.component._arenas
            for tensor in (*block.parameters(), *block.buffers()):
                assert lies_in(tensor, inside) == streams, (loras, streamed, number)


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_are_those_that_were_predicted(network, format):
    one = network(format)
    component = one.component
    for streamed in (0, 2, 3, 1, 0):
        one.result(streamed=streamed)
        # tensors are aligned in slots
        padding = 2 * 256 * len(component._store._slots) / BLOCKS
        assert 0 <= component.bytes_on("cpu") - component.device_bytes(streamed) <= (padding if streamed else 0)
        component.rest()
        slots = min(2, streamed) * max(component.block_bytes)
        assert component.bytes_on("cpu") == component.device_bytes(streamed) - slots == component.full_bytes


@pytest.mark.parametrize("loras", [NONE, AB], ids=["base", "LoRAs"])
@pytest.mark.parametrize("format", ["plain", "nvfp4"])
def test_runs_leave_memory_as_it_was(network, policy, format, loras):
    policy("file")
    one = network(format)
    for streamed in (2, 0):
        sizes = []
        for _ in range(5):
            one.result(loras, streamed)
            sizes.append((one.component.bytes_on("cpu"), memory()))
        assert len(set(sizes)) == 1, sizes


@pytest.mark.parametrize("format", ["plain", "nvfp4"])
def test_blocks_that_stream_no_more_give_host_memory_back(network, policy, no_shared_memory, format):
    policy("file")
    one = network(format)
    assert one.holds(A)
    before = memory()
    for streamed in (2, 3, 1):
        for loras in (A, NONE, A):
            one.result(loras, streamed)
            arenas = one.component._arenas.values()
            smallest = min(arena.size_bytes for arena in arenas)
            assert memory() < before + one.component._stream.slot_bytes + smallest // 2, "a block lies in memory twice"
        pinned = [weakref.ref(arena.memory) for arena in arenas]
        assert one.holds(A)
        assert memory() < before + smallest // 2
        assert [one for one in pinned if one() is not None] == []


def test_release_gives_slots_first_and_then_everything(network, no_shared_memory):
    one = network()
    component = one.component
    want = one.result(streamed=2)
    slots = component._stream.slot_bytes
    held, before = component.bytes_on("cpu"), memory()
    assert component.release("cpu", 1) == slots
    assert component.bytes_on("cpu") == held - slots
    assert memory() <= before - slots
    found = watched(component)
    with without_collector():
        assert component.release("cpu", None) == held - slots
        assert [one for one in found if one() is not None] == []
    assert component.bytes_on("cpu") == 0
    assert memory() <= before - held
    got = one.result(streamed=2)
    assert got == want


def test_an_interrupted_switch_of_a_streamed_network_goes_on(network, policy, reads):
    """The next use streams again, also when a reading in the background came between."""
    policy("file")
    one = network()
    one.result(streamed=2)
    with use_host(StandaloneHost(progress="quiet")) as standalone:
        thread = interrupting(standalone, reads)
        with pytest.raises(Interrupted):
            one.result(A, 2)
        thread.join()
        assert one.component._store.complete, "it was no switch"
        one.component.start(0)
        assert one.component._loading is not None
        assert one.holds(A, streamed=2)
        assert one.component._stream is not None
        assert one.component._stream.copies > 0
