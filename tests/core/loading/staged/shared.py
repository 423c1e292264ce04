"""What the tests of the staged reader share: tensors, files read in ways that are watched, and a device that is late."""

import threading
import time
from queue import SimpleQueue

import torch
from ltx2_engine.ltx2_core.loading import ring
from ltx2_engine.ltx2_core.loading.staged import Request
from safetensors.torch import load_file

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
    *(torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64),
    torch.bool,
]
SHAPES = [(), (0,), (1,), (3, 5), (2, 0, 4), (7, 1, 3, 2), (61,)]


def random_tensor(dtype, shape, seed=0):
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return data.view(dtype).reshape(shape)


def bits(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same(got, want):
    return got.dtype == want.dtype and got.shape == want.shape and torch.equal(bits(got), bits(want))


class Late(ring.Target):
    """A device whose copies run behind, one after another, as on a stream.

    given_is_host: what the caller gives is host memory, and only what is made here belongs to the device.
    """

    delay = 0.0005
    given_is_host = False

    def __init__(self, device):
        super().__init__(device)
        self.queue = SimpleQueue()
        self.thread = threading.Thread(target=self.run, name="late stream", daemon=True)
        self.thread.start()
        self.slots = 0
        self.consumer = threading.current_thread()
        self.made = None

    def run(self):
        for pairs, event in iter(self.queue.get, None):
            time.sleep(self.delay)
            with torch.inference_mode():
                for to, source in pairs:
                    to.copy_(source)
            event.set()

    def slot(self, size):
        self.slots += 1
        slot = super().slot(size)
        slot.memory.fill_(0xEE)
        return slot

    def empty(self, shape, dtype):
        self.made = super().empty(shape, dtype)
        return self.made

    def is_host_memory(self, tensor):
        return self.given_is_host and tensor is not self.made

    def copy(self, pairs, after):
        assert threading.current_thread() is self.consumer, "copies are begun by the consumer"
        event = threading.Event()
        event.query, event.synchronize = event.is_set, event.wait
        self.queue.put((pairs, event))
        return event

    def hand_over(self, copied):
        if copied is not None:
            copied.wait()

    def close(self):
        self.queue.put(None)
        self.thread.join()
        self.made = None


def readers():
    return [t.name for t in threading.enumerate() if t.name.startswith(("ltx2 reader", "late"))]


def requests_of(header, names=None):
    return [Request(header, header.tensors[name], name) for name in (header.tensors if names is None else names)]


def check(results, *headers):
    """Compare with the library; returns the tags in order."""
    want = {header: load_file(header.path) for header in headers}
    tags = []
    for request, tensor in results:
        assert same(tensor, want[request.file][request.info.name]), request.info.name
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "memory of its own"
        assert not tensor.is_inference()
        tags.append(request.tag)
    return tags


def patch_read(monkeypatch, before):
    """Call ``before(file, buffers, offset)`` ahead of each read."""
    read = ring._read_at

    def patched(opened, buffers, offset):
        before(opened, buffers, offset)
        return read(opened, buffers, offset)

    monkeypatch.setattr(ring, "_read_at", patched)


def numbered(count, elements=4):
    return {f"t{i:04}": torch.full((elements,), float(i)) for i in range(count)}
