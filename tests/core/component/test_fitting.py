"""Components on tiny checkpoints: in as much memory as the device, the host and the user leave them."""

import pytest
import torch
from ltx2_engine.ltx2_core import component as component_module
from ltx2_engine.ltx2_core.component import Component
from ltx2_engine.ltx2_core.host import HostOutOfMemory, use_host

from .shared import (
    AB,
    BLOCKS,
    GPU,
    LAYERS,
    NONE,
    PLAIN,
    A,
    Machine,
    arena_ranges,
    encoded,
    hidden_states,
    lies_in,
    running,
    sampled,
    transformer_of,
)


class OnDevice(Component):
    """A component on a device apart: all memory but that of arenas, which belong to the host."""

    def bytes_on(self, device):
        if self._store is None:
            return 0
        ranges, store = arena_ranges(self), self._store
        branches = [t for one in store._branches.values() for t in one.modules.buffers()]
        tensors = (*store.module.parameters(), *store.module.buffers(), *store.pristine.tensors(), *branches)
        held = {id(t): t for t in tensors if not t.is_meta}.values()
        in_host = sum(t.nbytes for t in held if lies_in(t, ranges))
        slots = self._stream.device_bytes if self._stream is not None else 0
        return in_host if device == "cpu" else sum(t.nbytes for t in held) - in_host + slots


@pytest.fixture
def apart(network, monkeypatch):
    """A function from a limit to a transformer on a device apart."""
    monkeypatch.setattr(component_module, "RESERVE_BYTES", 0)
    monkeypatch.setattr(component_module, "HOST_RESERVE_BYTES", 0)

    def make(limit=None, format=PLAIN):
        one = network(format)
        files = one.component._files
        one.component = OnDevice("transformer", files, device=GPU, dtype=torch.bfloat16, limit=limit)
        return one

    return make


WORK = 1 << 20
# tensors are aligned in slots
PADDING = 64 << 10


@pytest.mark.parametrize("loras", [NONE, AB], ids=["base", "LoRAs"])
def test_a_resident_network_streams_when_its_work_grows_and_comes_back(apart, policy, loras):
    policy("file")
    one = apart()
    full, block = one.component.full_bytes, one.component.block_bytes[0]
    with use_host(Machine(full + WORK)) as machine:
        for work, fewest in ((WORK, 0), (WORK + block, 3), (WORK, 0), (WORK + block // 2, 3), (0, 0)):
            assert one.holds(loras, streamed=None, work=work), work
            assert len(one.component._arenas) == fewest, work
            assert one.component.bytes_on(GPU) + work <= full + WORK + PADDING
            one.component.rest()
            assert machine.free_bytes(GPU) >= work


def test_a_number_of_streamed_blocks_that_is_given_counts_what_it_frees(apart):
    one = apart()
    full, block = one.component.full_bytes, one.component.block_bytes[0]
    with use_host(Machine(full + WORK + PADDING)):
        assert one.holds(streamed=0, work=WORK)
        assert one.holds(streamed=BLOCKS, work=WORK + block)
        with pytest.raises(HostOutOfMemory):
            one.result(streamed=1, work=WORK + block)
        assert one.holds(streamed=BLOCKS, work=WORK + block)


def test_bases_go_before_blocks_do(apart, policy, no_shared_memory):
    policy("pair")
    one = apart()
    full = one.component.full_bytes
    with use_host(Machine(2 * full + WORK)):
        assert one.holds(A, streamed=None, work=WORK // 2)
        kept = one.component.bytes_on(GPU) - full
        assert kept > full // 2
        assert one.holds(A, streamed=None, work=WORK)
        assert one.component.bytes_on(GPU) == full + kept, "there was room"
        assert one.holds(A, streamed=None, work=WORK + full // 2)
        assert one.component.bytes_on(GPU) == full
        assert one.component._arenas == {}
        assert one.holds(streamed=None, work=WORK + full // 2)
        assert one.holds(AB, streamed=None)


def test_a_longer_list_decides_anew_about_the_way_back(network, monkeypatch):
    asked = []

    def choose(touched, work, **_):
        asked.append(touched.held_bytes)
        return "pair" if len(asked) == 1 else "file"

    monkeypatch.setattr(component_module, "choose_policy", choose)
    one = network()
    small, large = (("b", 1.0, 1.0, 1.0),), AB
    for loras in (small, NONE, small, large, NONE, small, large):
        assert one.holds(loras)
    assert len(asked) == 2
    assert asked[0] < asked[1]
    assert one.component._kept_bytes() == 0


@pytest.mark.parametrize("streamed", [0, 3, 4, LAYERS])
def test_a_limit_streams_as_little_as_it_allows(fresh, apart, streamed):
    engine = fresh()
    want = hidden_states(engine, engine._text_encoder.use(0))

    def encoder(limit):
        return OnDevice("text encoder", engine._text_encoder._files, device=GPU, dtype=torch.bfloat16, limit=limit)

    one = encoder(WORK + encoder(0).device_bytes(streamed))
    with use_host(Machine(1 << 40)):
        assert hidden_states(engine, one.use(WORK)) == want
        assert len(one._arenas) == streamed
        padding = 2 * 256 * len(one._store._slots)
        assert one.bytes_on(GPU) <= one.device_bytes(streamed) + padding
        one.close()


@pytest.mark.parametrize("loras", [NONE, A], ids=["base", "LoRA"])
def test_a_limit_above_what_is_free_does_not_count(apart, policy, loras):
    policy("file")
    full = apart().component.full_bytes
    one = apart(full + WORK)
    with use_host(Machine(full + WORK - 1)):
        assert one.holds(loras, streamed=None, work=WORK)
        assert len(one.component._arenas) == BLOCKS


def test_a_limit_counts_the_bases(apart, policy):
    policy("pair")
    full = apart().component.full_bytes
    one = apart(full + WORK)
    with use_host(Machine(1 << 40)):
        assert one.holds(A, streamed=None)
        assert one.component.bytes_on(GPU) > full + WORK // 2
        assert one.holds(A, streamed=None, work=WORK)
        assert one.component.bytes_on(GPU) == full


def test_a_limit_that_cannot_be_kept_is_an_error_with_ways_out(apart):
    least = apart().component.device_bytes(BLOCKS)
    one = apart(least + WORK - 1)
    with use_host(Machine(1 << 40)):
        with pytest.raises(HostOutOfMemory, match=r"transformer .* limit of .* for work.*higher memory_limit"):
            one.result(streamed=None, work=WORK)
        assert one.component.bytes_on(GPU) == one.component.bytes_on("cpu") == 0
        assert one.holds(streamed=None, work=WORK - 1)


def test_what_fits_nowhere_is_an_error_with_ways_out_and_is_over_when_there_is_room(apart):
    one = apart()
    least = one.component.device_bytes(BLOCKS)
    with use_host(Machine(least + WORK - 1)) as machine:
        with pytest.raises(HostOutOfMemory, match=r"transformer does not fit on cpu:0.*Ways out.*fewer frames.*fp8"):
            one.result(streamed=None, work=WORK)
        machine.totals[GPU] += 1
        assert one.holds(streamed=None, work=WORK)


def test_host_memory_for_streamed_blocks_is_asked_for_first(apart):
    one = apart()
    needed = sum(one.component.block_bytes)
    with use_host(Machine(one.component.full_bytes, host=needed - 1)) as machine:
        with pytest.raises(HostOutOfMemory, match=r"streamed from host memory, of which .* are free.*Ways out"):
            one.result(streamed=None, work=one.component.block_bytes[0])
        assert one.component._arenas == {}
        machine.totals["cpu"] += 1
        assert one.holds(streamed=None, work=one.component.block_bytes[0])


def test_a_model_that_does_not_fit_is_an_error_before_anything_is_read(fresh, reads, context):
    engine = fresh()
    needed = transformer_of(engine).full_bytes
    with use_host(Machine(1 << 40, host=needed)) as machine:
        engine.start()
        assert running() == []
        with pytest.raises(HostOutOfMemory, match=r"transformer does not fit on cpu: .* for work.*Ways out, cheapest"):
            sampled(engine, context)
        with pytest.raises(HostOutOfMemory, match=r"text encoder does not fit on cpu.*Ways out"):
            encoded(engine)
        assert reads.order == []
        machine.totals["cpu"] = 1 << 40
        assert sampled(engine, context) == sampled(fresh(), context)
