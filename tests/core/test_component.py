"""Components on tiny checkpoints: read in the background, stopped anywhere, switched between LoRAs, streamed."""

import contextlib
import gc
import hashlib
import os
import random
import sys
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from ltx2_engine.ltx2_core import component as component_module
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.component import Component
from ltx2_engine.ltx2_core.components import adapters_of
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.engine import LocalEngine, ModelHandle, open_engine
from ltx2_engine.ltx2_core.evaluate import split_evaluate
from ltx2_engine.ltx2_core.host import HostOutOfMemory, Interrupted, host, use_host
from ltx2_engine.ltx2_core.job import SampleJob
from ltx2_engine.ltx2_core.loading import ring
from ltx2_engine.ltx2_core.loading import store as store_module
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError
from ltx2_engine.ltx2_core.loading.collector import collector_paused
from ltx2_engine.ltx2_core.loading.staged import Request
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.preflight import open_files
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.sampling.samplers import SamplerChoice
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.ltx2_core.text import gemma
from ltx2_engine.ltx2_core.text.tokenizer import load_tokenizer, tokenize
from ltx2_engine.ltx2_core.tiny import TEXT_ENCODER, checkpoint_file, write_tiny_set
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from ltx2_engine.ltx2_core.tiny_packed import write_tiny_packed

CLIP = ClipShape(9, 64, 64, 24.0)
OFF = StreamGuidance()
PROMPT = "a bell rings"
PLAIN, FORMATS = "plain", ("plain", "fp8", "nvfp4")
IN_FP8 = "plain in fp8"
POLICIES = ("pair", "pinned", "file", "side")
WAYS = [
    *((name, PLAIN) for name in POLICIES),
    *(("pair", "fp8"), ("file", "fp8"), ("pinned", "nvfp4"), ("side", "nvfp4")),
    *((name, IN_FP8) for name in ("pair", "pinned", "file")),
]
# blocks of the tiny transformer, layers of the tiny text encoder
BLOCKS, LAYERS = 3, 6

NONE = ()
A = (("a", 1.0, 1.0, 1.0),)
AB = (*A, ("b", 0.6, 1.0, 1.0))
HALF_A = (("a", 0.5, 1.0, 1.0),)
VIDEO_A = (("a", 1.0, 1.0, 0.0),)
LISTS = (NONE, A, AB, HALF_A, VIDEO_A)

pytestmark = pytest.mark.usefixtures("nothing_runs", "nothing_old")


@pytest.fixture(scope="module")
def nothing_old(models, context):
    """What was there before the tests is none of the collector's business, which makes it quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def nothing_runs():
    gc.collect()
    yield
    gc.collect()
    assert running() == []


def running():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ltx2")]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def context(models):
    checkpoint = models / "checkpoints" / "plain.safetensors"
    chosen = ModelSpec.of(checkpoint, models / "text_encoders" / TEXT_ENCODER, dtype="bfloat16", device="cpu")
    engine = LocalEngine(open_files(chosen))
    with torch.inference_mode():
        found = engine.encode(PROMPT)
    engine.close()
    return found


class Reads:
    """The reads of every file: how long each takes, how many bytes, and which fail or, while the gate is closed, wait."""

    def __init__(self, read):
        self._read, self._lock = read, threading.Lock()
        self.seconds = 0.0
        self.bytes = Counter()
        self.order = []
        self.began = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.waits = lambda file, offset: True
        self.fails = lambda file, offset: False

    def __call__(self, file, buffers, offset):
        name = os.path.basename(file.name)
        with self._lock:
            self.order.append((name, offset))
        self.began.set()
        end = time.monotonic() + 20
        while self.waits(name, offset) and not self.gate.wait(0.005):
            assert time.monotonic() < end, "a test left reads waiting"
        time.sleep(self.seconds)
        if self.fails(name, offset):
            raise OSError(5, "Input/output error")
        count = self._read(file, buffers, offset)
        with self._lock:
            self.bytes[name] += count
        return count


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


def transformer_of(engine):
    return engine._networks["transformer"]


def digest(*tensors):
    """Equal for equal bits, and small where memory is counted."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def weights(component):
    """Every tensor of the network but branches."""
    state = component._store.module.state_dict()
    return {name: digest(tensor) for name, tensor in state.items() if ".branches." not in name}


def job(context, steps=(1.0, 0.5, 0.0)):
    return SampleJob(AVLatent(CLIP), context, context, AV(OFF, OFF), steps, SamplerChoice("euler"), 3)


def sampled(engine, context):
    with torch.inference_mode():
        latents = engine.sample(job(context)).latents
    return digest(*latents.present())


def forward(engine, model, context):
    """One evaluation of the transformer."""
    with torch.inference_mode():
        states = engine._states(AVLatent(CLIP))
        noise = torch.Generator().manual_seed(1)
        x = states.map(lambda s: torch.randn(s.latent.shape, generator=noise).to(s.latent.dtype))
        features = context.features.map(lambda part: part.to(torch.bfloat16))
        evaluate = split_evaluate(model, states, plan_passes(AV(OFF, OFF)), features, None, lambda: None)
        (result,) = evaluate(x, 0.7, AV(True, True))
        return digest(*result.present())


def encoded(engine):
    with torch.inference_mode():
        return digest(*engine.encode(PROMPT).features.present())


def hidden_states(engine, encoder):
    with torch.inference_mode():
        ids = tokenize(load_tokenizer(engine.files.text_encoder.tokenizer), PROMPT)
        return digest(gemma.hidden_states(encoder, ids)[0])


def memory():
    """Bytes of memory of all tensors in the process."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.device.type == "cpu"]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


@contextlib.contextmanager
def without_collector():
    """What goes here goes because nothing refers to it, not because the collector came by."""
    gc.collect()
    # of a load that ends meanwhile, too
    with collector_paused:
        yield


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def watched(component):
    """Weak references to the network and to everything that was read of it."""
    module = component._store.module
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not t.is_meta]
    return [weakref.ref(one) for one in (component._store, module, *tensors)]


def places(engine):
    """Whether a place of the checkpoint belongs to the transformer."""
    sources = transformer_of(engine)._files.sources
    spans = [(info.begin, info.end) for source in sources for info in source.weight.parts.values()]
    name = engine.files.checkpoint.path.name
    return lambda file, offset: file == name and any(begin <= offset < end for begin, end in spans)


# reading in the background -------------------------------------------------------------------------------------------


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


def interrupting(standalone, reads):
    """A thread that interrupts after the tenth read from now; the reads after that wait for it."""
    reads.order.clear()
    reads.waits = lambda *_: len(reads.order) > 10
    reads.gate.clear()

    def interrupt():
        until(lambda: len(reads.order) > 10)
        standalone.interrupt()
        reads.gate.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


@contextlib.contextmanager
def cut(path, size):
    """A file without what follows ``size`` bytes, for a while."""
    content, status = path.read_bytes(), path.stat()
    os.truncate(path, size)
    try:
        yield
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


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


# stopping ------------------------------------------------------------------------------------------------------------


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


# switching between LoRAs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
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


# streaming -----------------------------------------------------------------------------------------------------------


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


def arena_ranges(component):
    return [
        (arena.memory.data_ptr(), arena.memory.data_ptr() + arena.size_bytes) for arena in component._arenas.values()
    ]


def lies_in(tensor, ranges):
    return any(begin <= tensor.data_ptr() < end for begin, end in ranges)


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


# fitting -------------------------------------------------------------------------------------------------------------


GPU = "cpu:0"


class Machine(StandaloneHost):
    """A host whose device has so many bytes beside those of main memory, of which its residents' are taken."""

    def __init__(self, total, host=1 << 40):
        super().__init__(progress="quiet")
        self.totals = {"cpu": host, GPU: total}

    def compute_devices(self):
        return [GPU, "cpu"]

    def free_bytes(self, device):
        return max(self.totals[device] - sum(one.bytes_on(device) for one in self._residents), 0)


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
