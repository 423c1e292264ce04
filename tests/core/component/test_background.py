"""Components on tiny checkpoints: read in the background."""

import os
import sys
import threading
from collections import Counter
from dataclasses import replace

import pytest
from ltx2_engine.ltx2_core.engine import LocalEngine
from ltx2_engine.ltx2_core.handles import ModelHandle, open_engine
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError

from .shared import AB, PLAIN, POLICIES, A, cut, encoded, places, running, sampled, transformer_of, until, weights


def test_text_is_encoded_while_the_transformer_is_read(fresh, reads, context):
    alone = fresh()
    alone.start = lambda: None
    want = sampled(alone, context), weights(transformer_of(alone))
    prompt = encoded(alone)

    engine = fresh()
    reads.gate.clear()
    engine.start()
    assert running(), "nothing reads"
    assert transformer_of(engine).bytes_on("cpu") == 0
    reads.waits = places(engine)
    until(lambda: engine._text_encoder._loading.join(0))
    beside = encoded(engine)
    assert transformer_of(engine)._loading is not None
    assert not transformer_of(engine)._loading.join(0), "the transformer was not being read"
    reads.gate.set()
    assert beside == prompt
    assert sampled(engine, context) == want[0]
    assert weights(transformer_of(engine)) == want[1]


def test_the_text_encoder_is_read_before_the_transformer(fresh, reads):
    engine = fresh()
    reads.seconds = 0.01
    engine.start()
    until(lambda: transformer_of(engine)._loading.join(0))
    of_transformer = places(engine)
    kinds = [of_transformer(*place) for place in reads.order]
    assert True in kinds
    assert False in kinds
    assert kinds == sorted(kinds)


def test_a_second_start_begins_nothing(fresh, reads, context):
    engine = fresh()
    engine.start()
    engine.start()
    sampled(engine, context)
    encoded(engine)
    assert max(Counter(reads.order).values()) == 1, "something was read twice"


@pytest.mark.parametrize(("name", "format"), [("pair", PLAIN), ("side", PLAIN), ("file", "nvfp4")])
def test_sizes_can_be_asked_for_while_a_network_is_read(network, policy, name, format):
    """As hosts do whenever they need memory; the thread puts layers and weights in place meanwhile."""
    policy(name)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(10):
            one = network(format)
            one.component.start(0, one.adapters(AB))
            while not one.component._loading.join(0):
                pending = one.component.pending_bytes
                assert pending + one.component.bytes_on("cpu") >= one.component.full_bytes
            one.component.close()
    finally:
        sys.setswitchinterval(interval)


def test_an_engine_with_loras_reads_them_ahead(fresh, reads, context):
    engine = fresh(loras=A)
    for _ in range(2):
        engine.start()
        until(lambda: transformer_of(engine)._loading.join(0))
        assert reads.bytes["a.safetensors"] > 0
        reads.bytes.clear()
        assert sampled(engine, context) == sampled(fresh(loras=A), context)
        reads.bytes.clear()
        engine.close()
    base = engine._base
    base.start()
    until(lambda: transformer_of(base)._loading.join(0))
    assert reads.bytes["a.safetensors"] == 0, "LoRAs of another handle were read"


@pytest.mark.parametrize("policy_name", POLICIES)
def test_a_lora_that_comes_while_the_model_is_read(spec, fresh, reads, context, policy, policy_name):
    policy(policy_name)
    want_engine = fresh(loras=AB)
    want = sampled(want_engine, context), weights(transformer_of(want_engine))
    handle = ModelHandle(spec(), open_engine(spec()))
    of_transformer = places(handle.engine)

    def begun():
        return sum(of_transformer(*place) for place in reads.order.copy()) > 100

    reads.order.clear()
    reads.waits = lambda *place: of_transformer(*place) and begun()
    reads.gate.clear()
    handle.start()
    until(begun)
    assert not transformer_of(handle.engine)._loading.join(0)
    reads.bytes.clear()
    for name, strength, *_ in AB:
        handle = handle.with_lora(spec(loras=AB).loras[0].path.with_name(f"{name}.safetensors"), strength)
    reads.gate.set()
    assert sampled(handle.engine, context) == want[0]
    assert weights(transformer_of(handle.engine)) == want[1]
    assert reads.bytes["a.safetensors"] < 2 * os.path.getsize(spec(loras=A).loras[0].path)
    # what had been read was read again, and nothing else
    assert reads.bytes["plain.safetensors"] < 1.25 * transformer_of(handle.engine).full_bytes


def test_an_error_of_the_thread_surfaces_in_the_next_user_with_the_files_name(fresh, reads, context):
    engine = fresh()
    want = sampled(engine, context)
    engine.close()
    reads.fails = places(engine)
    engine.start()
    until(lambda: transformer_of(engine)._loading.join(0))
    encoded(engine)
    with pytest.raises(CheckpointError, match=r"plain\.safetensors: reading failed \(Input/output error\) at tensor"):
        sampled(engine, context)
    assert transformer_of(engine).bytes_on("cpu") == 0
    reads.fails = lambda *_: False
    assert sampled(engine, context) == want


@pytest.mark.parametrize("which", ["text encoder", "transformer"])
def test_a_file_cut_short_while_it_is_read(fresh, spec, reads, context, which):
    engine = fresh()
    prompt = encoded(engine)
    want = sampled(engine, context)
    engine.close()
    path = next(spec().text_encoder.glob("*.safetensors")) if which == "text encoder" else spec().checkpoint
    reads.waits = lambda name, offset: name == path.name
    reads.gate.clear()
    reads.order.clear()
    engine.start()
    until(lambda: any(name == path.name for name, _ in reads.order))
    with cut(path, 2000):
        reads.gate.set()
        with pytest.raises(CheckpointError, match=rf"{path.name}: the file (ends|was changed)"):
            encoded(engine)
        if which == "transformer":
            with pytest.raises(CheckpointError, match=rf"{path.name}: the file (ends|was changed)"):
                sampled(engine, context)
    assert encoded(engine) == prompt
    assert sampled(engine, context) == want


@pytest.mark.parametrize("complete", [False, True], ids=["first reading", "switch"])
def test_a_lora_cut_short_while_it_is_read_is_named(fresh, spec, reads, context, complete):
    base = fresh()
    want = sampled(base, context)
    if not complete:
        base.close()
    chosen = spec(loras=A)
    engine = LocalEngine(replace(base.files, spec=chosen), base)
    reads.waits = lambda name, offset: name == "a.safetensors"
    reads.gate.clear()
    with cut(chosen.loras[0].path, 20_000):
        threading.Timer(0.05, reads.gate.set).start()
        with pytest.raises(CheckpointError, match=r"a\.safetensors: the file (ends|was changed)"):
            sampled(engine, context)
    assert sampled(base, context) == want
    assert sampled(engine, context) == sampled(fresh(loras=A), context)


def test_a_network_that_was_read_before_its_lora_failed_is_finished_all_the_same(fresh, spec, reads, context):
    base = fresh()
    transformer_of(base).overlap = False
    engine = LocalEngine(replace(base.files, spec=spec(loras=A)), base)
    reads.fails = lambda name, offset: name == "a.safetensors"
    with pytest.raises(CheckpointError, match=r"a\.safetensors: reading failed"):
        sampled(engine, context)
    component = transformer_of(base)
    assert component._store.complete, "it was read together with the LoRA"
    reads.bytes.clear()
    assert sampled(base, context) == sampled(fresh(), context)
    assert not component._store.module.training
    reads.fails = lambda *_: False
    assert sampled(engine, context) == sampled(fresh(loras=A), context)
