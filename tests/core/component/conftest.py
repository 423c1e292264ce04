"""Tiny models, engines of their own, and watched files; no test leaves a thread behind."""

import gc
from dataclasses import replace

import pytest
import torch
from ltx2_engine.ltx2_core import component as component_module
from ltx2_engine.ltx2_core.components import adapters_of
from ltx2_engine.ltx2_core.engine import LocalEngine
from ltx2_engine.ltx2_core.loading import ring
from ltx2_engine.ltx2_core.loading import store as store_module
from ltx2_engine.ltx2_core.loading.staged import Request
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.preflight import open_files
from ltx2_engine.ltx2_core.tiny import TEXT_ENCODER, checkpoint_file, write_tiny_set
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from ltx2_engine.ltx2_core.tiny_packed import write_tiny_packed

from .shared import FORMATS, NONE, PLAIN, PROMPT, Reads, forward, running, transformer_of, weights


@pytest.fixture(scope="module", autouse=True)
def nothing_old(models, context):
    """What was there before the tests is none of the collector's business, which makes it quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_runs():
    gc.collect()
    yield
    gc.collect()
    assert running() == []


@pytest.fixture(scope="package")
def models(tmp_path_factory):
    """A model folder with the tiny checkpoint of 2.3 in three formats, and two LoRAs."""
    root = tmp_path_factory.mktemp("component")
    write_tiny_set(root, "2.3")
    checkpoint = root / "checkpoints" / checkpoint_file("2.3")
    checkpoint.rename(checkpoint.with_name("plain.safetensors"))
    checkpoint = checkpoint.with_name("plain.safetensors")
    for format in FORMATS[1:]:
        write_tiny_packed(checkpoint.with_name(f"{format}.safetensors"), checkpoint, format)
    write_tiny_lora(root / "loras" / "a.safetensors", checkpoint, targets="all", seed=1)
    write_tiny_lora(root / "loras" / "b.safetensors", checkpoint, rank=2, seed=2, alpha=1.0)
    write_tiny_lora(root / "loras" / "dora.safetensors", checkpoint, kind="dora", seed=3)
    return root


@pytest.fixture
def spec(models):
    """A function from a format and a list of LoRAs to the spec of the model."""

    def make(format=PLAIN, loras=NONE, **options):
        file, _, numerics = format.partition(" in ")
        checkpoint = models / "checkpoints" / f"{file}.safetensors"
        options = {**options, "numerics": numerics or "exact"}
        encoder = models / "text_encoders" / TEXT_ENCODER
        made = ModelSpec.of(checkpoint, encoder, dtype="bfloat16", device="cpu", **options)
        for name, strength, video, audio in loras:
            made = made.with_lora(models / "loras" / f"{name}.safetensors", strength, video=video, audio=audio)
        return made

    return make


@pytest.fixture
def fresh(spec):
    """A function from a format and a list of LoRAs to an engine with networks of its own."""
    made = []

    def make(format=PLAIN, loras=NONE, **options):
        chosen = spec(format, loras, **options)
        base = LocalEngine(open_files(chosen.base))
        made.append(base)
        return base if not loras else LocalEngine(replace(base.files, spec=chosen), base)

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="package")
def context(models):
    checkpoint = models / "checkpoints" / "plain.safetensors"
    chosen = ModelSpec.of(checkpoint, models / "text_encoders" / TEXT_ENCODER, dtype="bfloat16", device="cpu")
    engine = LocalEngine(open_files(chosen))
    with torch.inference_mode():
        found = engine.encode(PROMPT)
    engine.close()
    return found


@pytest.fixture
def reads(monkeypatch):
    """Small reads that are watched."""
    monkeypatch.setattr(ring, "CHUNK_BYTES", 16 << 10)
    monkeypatch.setattr(ring, "MIN_CHUNK_BYTES", 16 << 10)
    watched = Reads(ring._read_at)
    monkeypatch.setattr(ring, "_read_at", watched)
    yield watched
    watched.gate.set()


@pytest.fixture
def no_shared_memory(monkeypatch):
    """Small tensors have memory of their own, as the large ones of real models have."""
    monkeypatch.setattr(store_module, "Request", lambda file, info, tag=None, shared=False: Request(file, info, tag))


@pytest.fixture
def policy(monkeypatch):
    """A function that has every network choose this way back."""

    def choose(name):
        monkeypatch.setattr(component_module, "choose_policy", lambda *_, **__: name)

    return choose


@pytest.fixture(scope="package")
def wanted():
    """What fresh networks compute and hold, by format, list of LoRAs and way back."""
    return {}


@pytest.fixture
def network(fresh, context, wanted):
    """A function from a format to a transformer, what it computes with a list of LoRAs, and a fresh one's result."""

    class Network:
        def __init__(self, format=PLAIN, **options):
            self.engine = fresh(format, **options)
            self.component = transformer_of(self.engine)
            self.format = format
            self._adapters = {}

        def adapters(self, loras):
            if loras not in self._adapters:
                self._adapters[loras] = self._read(loras)
            return self._adapters[loras]

        def _read(self, loras):
            spec = self.engine.files.spec
            for name, strength, video, audio in loras:
                path = spec.checkpoint.parents[1] / "loras" / f"{name}.safetensors"
                spec = spec.with_lora(path, strength, video=video, audio=audio)
            return adapters_of(replace(self.engine.files, spec=spec))[0]

        def result(self, loras=NONE, streamed=0, work=0):
            model = self.component.use(work, self.adapters(loras), streamed=streamed)
            return forward(self.engine, model, context), weights(self.component)

        def holds(self, loras=NONE, streamed=0, **options):
            """Whether it has, with these LoRAs, the bits that a network has which never had others."""
            got = self.result(loras, streamed, **options)
            beside = any(slot.state.beside and not slot.packed for slot in self.component._store._slots)
            key = self.format, loras, "side" if beside else "file"
            if key not in wanted:
                other = Network(self.format)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(component_module, "choose_policy", lambda *_, **__: key[-1])
                    wanted[key] = other.result(loras)
                other.component.close()
            return got == wanted[key]

    return Network
