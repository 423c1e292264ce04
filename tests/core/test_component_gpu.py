"""Components on a GPU, tiny checkpoints: bits and memory, whatever is read, switched, streamed or stopped."""

import contextlib
import gc
import mmap
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from ltx2_engine.ltx2_core import component as component_module
from ltx2_engine.ltx2_core import engine as engine_module
from ltx2_engine.ltx2_core import tiny
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.engine import LocalEngine
from ltx2_engine.ltx2_core.handles import open_engine
from ltx2_engine.ltx2_core.host import HostOutOfMemory, Interrupted, use_host
from ltx2_engine.ltx2_core.job import SampleJob
from ltx2_engine.ltx2_core.loading import ring
from ltx2_engine.ltx2_core.loading import store as store_module
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError
from ltx2_engine.ltx2_core.loading.staged import Request
from ltx2_engine.ltx2_core.loading.while_loading import while_loading
from ltx2_engine.ltx2_core.memory_plan import SLOTS
from ltx2_engine.ltx2_core.memory_sizes import RESERVE_BYTES
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.preflight import open_files
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance
from ltx2_engine.ltx2_core.sampling.samplers import SamplerChoice
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from ltx2_engine.ltx2_core.tiny_packed import write_tiny_packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("nothing_runs"),
]

CLIP = ClipShape(9, 64, 64, 24.0)
OFF = StreamGuidance()
PROMPT = "a bell rings"
PLAIN, FORMATS = "plain", ("plain", "fp8", "nvfp4")
BLOCKS = 3
LISTS = ((), (("a", 1.0),), (("a", 1.0), ("b", 0.6)), (("a", 0.5),))
GPU = "cuda:0"


@pytest.fixture
def nothing_runs():
    yield
    gc.collect()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("ltx2")] == []


def write_model(root):
    tiny.write_tiny_set(root, "2.3")
    checkpoint = root / "checkpoints" / "plain.safetensors"
    (root / "checkpoints" / tiny.checkpoint_file("2.3")).rename(checkpoint)
    write_tiny_lora(root / "loras" / "a.safetensors", checkpoint, targets="all", seed=1)
    write_tiny_lora(root / "loras" / "b.safetensors", checkpoint, rank=2, seed=2, alpha=1.0)
    return checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("component")
    checkpoint = write_model(root)
    for format in FORMATS[1:]:
        write_tiny_packed(checkpoint.with_name(f"{format}.safetensors"), checkpoint, format)
    return root


@pytest.fixture(scope="module")
def large_models(tmp_path_factory):
    """A model folder with a transformer of 1.2 GB, in blocks of 48 MB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "_WIDTH", 1024)
        patch.setattr(tiny, "_AUDIO_WIDTH", 512)
        sizes = {"attention_head_dim": 256, "audio_attention_head_dim": 128}
        sizes |= {"cross_attention_dim": 1024, "audio_cross_attention_dim": 512, "num_layers": 24}
        patch.setattr(tiny, "_TRANSFORMER", tiny._TRANSFORMER | sizes)
        root = tmp_path_factory.mktemp("large")
        write_model(root)
    return root


def spec_of(root, format=PLAIN, loras=(), **options):
    checkpoint = root / "checkpoints" / f"{format}.safetensors"
    encoder = root / "text_encoders" / tiny.TEXT_ENCODER
    spec = ModelSpec.of(checkpoint, encoder, dtype="bfloat16", device=GPU, **options)
    for name, strength in loras:
        spec = spec.with_lora(root / "loras" / f"{name}.safetensors", strength)
    return spec


def engine_of(spec):
    """An engine with networks of its own."""
    base = LocalEngine(open_files(spec.base))
    return base if not spec.loras else LocalEngine(replace(base.files, spec=spec), base)


@pytest.fixture
def fresh(models):
    """A function from a format and a list of LoRAs to an engine with networks of its own."""
    made = []

    def make(format=PLAIN, loras=()):
        made.append(engine_of(spec_of(models, format, loras)))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Reads:
    """Small reads: how long each takes, and from which on they fail."""

    def __init__(self, read):
        self._read, self.seconds, self.fails_after, self.count = read, 0.0, None, 0

    def __call__(self, *place):
        time.sleep(self.seconds)
        self.count += 1
        if self.fails_after is not None and self.count > self.fails_after:
            raise OSError(5, "Input/output error")
        return self._read(*place)


@pytest.fixture
def reads(monkeypatch):
    monkeypatch.setattr(ring, "CHUNK_BYTES", 16 << 10)
    monkeypatch.setattr(ring, "MIN_CHUNK_BYTES", 16 << 10)
    watched = Reads(ring._read_at)
    monkeypatch.setattr(ring, "_read_at", watched)
    return watched


@pytest.fixture
def policy(monkeypatch):
    def choose(name):
        monkeypatch.setattr(component_module, "choose_policy", lambda *_, **__: name)

    return choose


def transformer_of(engine):
    return engine._networks["transformer"]


def encoded(engine):
    with torch.inference_mode():
        return engine.encode(PROMPT)


def sampled(engine, context, streamed=None):
    """The latents of a short run; streamed: how many blocks are streamed, in place of what the plan says."""
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        if streamed is not None:
            use = transformer_of(engine).use
            patch.setattr(
                transformer_of(engine), "use", lambda work, adapters, **_: use(work, adapters, streamed=streamed)
            )
        job = SampleJob(AVLatent(CLIP), context, context, AV(OFF, OFF), (1.0, 0.5, 0.0), SamplerChoice("euler"), 3)
        return engine.sample(job).latents


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.present(), second.present(), strict=True))


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def allocated():
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def num_tensors(module):
    return sum(1 for _ in (*module.parameters(), *module.buffers()))


@contextlib.contextmanager
def without_collector():
    """What goes here goes because nothing refers to it, not because the collector came by."""
    gc.collect()
    # of a load that ends meanwhile, too
    with while_loading:
        yield


# reading in the background, and stopping it --------------------------------------------------------------------------


def test_reading_in_the_background_gives_the_same_bits(fresh):
    alone = fresh()
    alone.start = lambda: None
    prompt = encoded(alone)
    want = sampled(alone, prompt)
    alone.close()
    for _ in range(3):
        engine = fresh()
        engine.start()
        context = encoded(engine)
        assert same(context.features, prompt.features)
        assert same(sampled(engine, context), want)
        engine.close()


@pytest.mark.parametrize("way", ["interrupt", "close", "release", "drop", "error"])
def test_what_stops_a_reading_gives_the_memory_back(models, reads, way):
    warm = engine_of(spec_of(models))
    context = encoded(warm)
    want = sampled(warm, context)
    warm.close()
    del warm
    gc.collect()
    before = allocated()
    reads.seconds = 0.05
    if way == "error":
        reads.fails_after = reads.count + 20
    engine = open_engine(spec_of(models))
    component = transformer_of(engine)
    with use_host(StandaloneHost(progress="quiet")) as host, without_collector():
        component.start(0)
        until(lambda: component.bytes_on(GPU) > 0)
        started = time.monotonic()
        if way == "interrupt":
            host.interrupt()
            with pytest.raises(Interrupted):
                component.use(0)
        elif way == "error":
            with contextlib.suppress(CheckpointError):
                component.use(0)
                raise AssertionError("nothing failed")
        elif way == "close":
            component.close()
        elif way == "release":
            component.release(GPU, None)
        else:
            del engine
        assert way == "error" or time.monotonic() - started < 1
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("ltx2")] == []
        assert component.bytes_on(GPU) == 0
        assert allocated() == before
    reads.seconds, reads.fails_after = 0.0, None
    engine = open_engine(spec_of(models))
    assert same(sampled(engine, context), want)
    engine.close()


# LoRAs and streaming -------------------------------------------------------------------------------------------------


@pytest.fixture
def handles(fresh, models):
    """A function from a format to engines of one model, by list of LoRAs, and to what fresh engines sample."""

    def make(format=PLAIN):
        base = fresh(format)
        context = encoded(base)
        specs = {loras: spec_of(models, format, loras) for loras in LISTS}
        engines = {loras: LocalEngine(replace(base.files, spec=spec), base) for loras, spec in specs.items() if loras}
        engines[()] = base
        want = {}
        for loras in LISTS:
            one = fresh(format, loras)
            want[loras] = sampled(one, context)
            one.close()
        return engines, context, want

    return make


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["pair", "pinned", "file"])
def test_lists_and_streamed_counts_in_any_order(handles, policy, name, format):
    policy(name)
    engines, context, want = handles(format)
    component = transformer_of(engines[()])
    choice = random.Random(f"{name} {format}")
    a = (("a", 1.0),)
    steps = [(a, 0), ((), 0), (a, 0), (a, 2), ((), 2), (a, 2), (a, 0), ((), BLOCKS), (a, 0), (a, 1)]
    steps += [(choice.choice(LISTS), choice.randrange(BLOCKS + 1)) for _ in range(6)]
    for number, (loras, streamed) in enumerate(steps):
        assert same(sampled(engines[loras], context, streamed), want[loras]), steps[: number + 1]
        places = {tensor.device.type for tensor in component._store.module.parameters()}
        assert places == ({"cuda", "cpu"} if streamed else {"cuda"})
        assert len(component._arenas) == streamed
        assert all(arena.pinned for arena in component._arenas.values())


def test_lists_beside_the_weights_in_any_order(handles, policy):
    policy("side")
    engines, context, want = handles()
    for loras in (*LISTS, *random.Random(0).choices(LISTS, k=8)):
        assert same(sampled(engines[loras], context, 0), want[loras]), loras


def test_bases_are_kept_in_pinned_memory(handles, policy):
    policy("pinned")
    engines, context, want = handles()
    a = (("a", 1.0),)
    sampled(engines[a], context)
    component = transformer_of(engines[a])
    component._keeping.join()
    assert component._kept
    assert all(piece.pinned for piece in component._kept)
    assert component._store.expected_bytes(()) == 0
    on_device = component.bytes_on(GPU)
    assert same(sampled(engines[()], context), want[()])
    assert same(sampled(engines[a], context), want[a])
    assert component.bytes_on(GPU) == on_device == component.full_bytes
    assert component.release("cpu", 1) > 0
    assert component._kept == []
    assert component.bytes_on(GPU) == on_device


@pytest.mark.parametrize("format", FORMATS)
def test_branches_follow_their_weights_between_devices(fresh, models, policy, format):
    """Streamed with LoRAs beside the weights, then resident: everything that a block has is where it computes."""
    policy("side")
    engine = fresh(format)
    context = encoded(engine)
    with_lora = LocalEngine(replace(engine.files, spec=spec_of(models, format, (("a", 1.0),))), engine)
    want = sampled(with_lora, context, 0)
    component = transformer_of(engine)
    for streamed in (2, 0, 3, 1, 0):
        component.use(0, with_lora._adapters, streamed=streamed)
        for number, block in enumerate(component._store.module.blocks):
            device = "cpu" if number in component._arenas else "cuda"
            assert {t.device.type for t in (*block.parameters(), *block.buffers())} == {device}
        assert same(sampled(with_lora, context, streamed), want)


@pytest.mark.parametrize("loras", [(), (("a", 1.0), ("b", 0.6))], ids=["base", "LoRAs"])
@pytest.mark.parametrize("format", ["plain", "nvfp4"])
def test_memory_is_what_was_predicted_and_stays_so(fresh, policy, monkeypatch, format, loras):
    # small tensors would share memory with others that stay
    monkeypatch.setattr(store_module, "Request", lambda file, info, tag=None, shared=False: Request(file, info, tag))
    policy("file")
    engine = fresh(format, loras)
    component = transformer_of(engine)
    context = encoded(engine)
    sampled(engine, context)
    engine.close()
    gc.collect()
    empty = allocated()
    for streamed in (0, 2, 3, 1, 0):
        held = []
        for _ in range(5):
            sampled(engine, context, streamed)
            gc.collect()
            held.append((component.bytes_on(GPU), component.bytes_on("cpu"), allocated()))
        assert len(set(held)) == 1, held
        on_device, in_host, total = held[0]
        module, slots = component._store.module, min(SLOTS, streamed)
        # a plan knows weights only: branches come on top, those of resident blocks and those that visit a slot with theirs
        visiting = sum(t.nbytes for name, t in module.blocks[0].named_buffers() if ".branches." in name)
        on_top = component._kept_bytes() + slots * visiting
        # in a slot as in the arenas that are copied to it, a tensor begins at a multiple of 256, and the end is a page's
        rounding = slots * (256 * num_tensors(module.blocks[0]) + mmap.PAGESIZE)
        assert 0 <= on_device - component.device_bytes(streamed) - on_top <= rounding
        # PyTorch hands out memory in pieces of 512 bytes, to tensors, arenas or slots
        assert 0 <= total - empty - on_device <= 512 * (num_tensors(module) + BLOCKS + slots)
        assert in_host == sum(t.nbytes for arena in component._arenas.values() for t in arena.tensors)
    engine.close()
    gc.collect()
    assert allocated() == empty


@pytest.mark.parametrize("name", ["pair", "pinned", "file", "side"])
def test_switches_leave_memory_as_it_was(handles, policy, name):
    policy(name)
    engines, context, _ = handles()
    component = transformer_of(engines[()])
    held = []
    for _ in range(6):
        for loras in LISTS:
            sampled(engines[loras], context)
            if component._keeping is not None:
                component._keeping.join()
        gc.collect()
        held.append((component.bytes_on(GPU), component.bytes_on("cpu"), allocated()))
    assert len(set(held[1:])) == 1, held


# fitting -------------------------------------------------------------------------------------------------------------


class Small(StandaloneHost):
    """A host whose GPU has so many bytes for tensors."""

    def __init__(self, total):
        super().__init__(progress="quiet")
        self.total = total

    def free_bytes(self, device):
        if device == "cpu":
            return 1 << 40
        return max(self.total - torch.cuda.memory_allocated(device), 0)


def test_a_resident_network_streams_when_its_work_grows_and_comes_back(fresh, policy, monkeypatch):
    monkeypatch.setattr(component_module, "RESERVE_BYTES", 0)
    policy("pair")
    engine = fresh()
    context = encoded(engine)
    engine._text_encoder.close()
    engine._networks["text_head"].close()
    want = sampled(engine, context, 0)
    component = transformer_of(engine)
    component.close()
    gc.collect()
    work, margin = 8 << 20, 256 << 10
    full, block = component.full_bytes, max(component.block_bytes)
    with use_host(Small(allocated() + full + work + margin)) as host:
        for wanted, count in ((work, 0), (work + block, BLOCKS), (work, 0)):
            component.use(wanted)
            assert len(component._arenas) == count
            assert host.free_bytes(GPU) >= wanted
        with pytest.raises(HostOutOfMemory, match="Ways out"):
            component.use(work + full)
    assert same(sampled(engine, context, 0), want)


@pytest.mark.parametrize("loras", [(), (("a", 1.0), ("b", 0.6))], ids=["base", "LoRAs"])
def test_a_limit_holds_for_the_whole_run_and_changes_nothing(large_models, monkeypatch, loras):
    monkeypatch.setattr(engine_module, "_TEXT_WORK_BYTES", 64 << 20)

    def run(limit):
        engine = engine_of(spec_of(large_models, PLAIN, loras, limit_gib=limit))
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = allocated()
        context = encoded(engine)
        latents = sampled(engine, context)
        streamed = len(transformer_of(engine)._arenas)
        with torch.inference_mode():
            engine.decode(replace(AVLatent(CLIP), latents=latents), "auto")
        again = sampled(engine, context)
        peak = torch.cuda.max_memory_allocated() - before
        engine.close()
        return context.features, latents, again, streamed, peak

    features, want, _, streamed, peak = run(0)
    limit = RESERVE_BYTES + (640 << 20)
    assert streamed == 0
    assert peak > limit - RESERVE_BYTES, "the model is too small for this test"
    limited, latents, again, streamed, peak = run(limit / 2**30)
    assert 4 <= streamed < 24
    assert peak <= limit - RESERVE_BYTES
    assert same(limited, features)
    assert same(latents, want)
    assert same(again, want)
    with use_host(StandaloneHost(progress="quiet")):
        engine = engine_of(spec_of(large_models, PLAIN, loras, limit_gib=(RESERVE_BYTES + (32 << 20)) / 2**30))
        with pytest.raises(HostOutOfMemory, match="Ways out"):
            encoded(engine)
        engine.close()
