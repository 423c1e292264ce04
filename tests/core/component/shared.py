"""What the tests of components share: names of tiny models, watched reads, hosts, and what is asked of networks."""

import contextlib
import gc
import hashlib
import os
import threading
import time
import weakref
from collections import Counter

import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.evaluate import split_evaluate
from ltx2_engine.ltx2_core.job import SampleJob
from ltx2_engine.ltx2_core.loading.while_loading import while_loading
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.sampling.samplers import SamplerChoice
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.ltx2_core.text import gemma
from ltx2_engine.ltx2_core.text.tokenizer import load_tokenizer, tokenize

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
# the name of a device apart from main memory
GPU = "cpu:0"

NONE = ()
A = (("a", 1.0, 1.0, 1.0),)
AB = (*A, ("b", 0.6, 1.0, 1.0))
HALF_A = (("a", 0.5, 1.0, 1.0),)
VIDEO_A = (("a", 1.0, 1.0, 0.0),)
LISTS = (NONE, A, AB, HALF_A, VIDEO_A)


def running():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ltx2")]


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
    with while_loading:
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


def arena_ranges(component):
    return [
        (arena.memory.data_ptr(), arena.memory.data_ptr() + arena.size_bytes) for arena in component._arenas.values()
    ]


def lies_in(tensor, ranges):
    return any(begin <= tensor.data_ptr() < end for begin, end in ranges)


class Machine(StandaloneHost):
    """A host whose device has so many bytes beside those of main memory, of which its residents' are taken."""

    def __init__(self, total, host=1 << 40):
        super().__init__(progress="quiet")
        self.totals = {"cpu": host, GPU: total}

    def compute_devices(self):
        return [GPU, "cpu"]

    def free_bytes(self, device):
        return max(self.totals[device] - sum(one.bytes_on(device) for one in self._residents), 0)
