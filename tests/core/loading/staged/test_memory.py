"""Where the staged reader puts tensors: memory that the caller gives, and pieces that neighbours share."""

import os

import pytest
import torch
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError
from ltx2_engine.ltx2_core.loading.staged import Request, read_staged
from safetensors.torch import load_file

from .shared import DTYPES, numbered, random_tensor, requests_of, same


def test_bytes_go_to_the_memory_that_the_caller_gives(file, path_to_memory, sizes):
    sizes(24)
    header = file({f"{i}": random_tensor(d, (5, 3), i) for i, d in enumerate(DTYPES)})
    arena = torch.zeros(len(DTYPES), 256, dtype=torch.uint8)
    memory = {
        name: arena[i, : info.size_bytes].view(info.torch_dtype).reshape(info.torch_shape)
        for i, (name, info) in enumerate(header.tensors.items())
        if i % 3
    }
    want = load_file(header.path)
    for request, tensor in read_staged(requests_of(header), device="cpu", allocate=lambda r: memory.get(r.tag)):
        assert same(tensor, want[request.tag])
        assert memory.get(request.tag, tensor) is tensor
    assert all(same(memory[name], want[name]) for name in memory)


@pytest.mark.parametrize("infers", [False, True])
def test_parameters_and_inference_tensors_can_be_read_into(file, path_to_memory, infers):
    tensors = {"parameter": torch.randn(700), "wide": torch.randn(700), "bytes": random_tensor(torch.uint8, (700,))}
    header = file(tensors)
    with torch.inference_mode():
        inferred = {name: torch.zeros_like(tensors[name]) for name in ("wide", "bytes")}
    memory = inferred | {"parameter": torch.nn.Parameter(torch.zeros(700))}
    with torch.inference_mode(infers):
        for request, tensor in read_staged(requests_of(header), device="cpu", allocate=lambda r: memory[r.tag]):
            assert tensor is memory[request.tag]
    assert all(same(memory[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "memory",
    [
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(2, 2),
        torch.zeros(8)[::2],
        torch.zeros(4, device="meta"),
    ],
    ids=["dtype", "shape", "strides", "device"],
)
def test_unfit_memory_is_refused(file, memory):
    with pytest.raises(ValueError, match=r"'t0000' is torch.float32 \[4\] for cpu; it was given memory of"):
        list(read_staged(requests_of(file(numbered(2))), device="cpu", allocate=lambda r: memory))


def shared(header):
    return [Request(header, info, name, shared=True) for name, info in header.tensors.items()]


def test_neighbours_may_share_memory_and_hold_the_same_bits(file, path_to_memory, sizes):
    sizes(200, slots=3)
    shapes = [(16,), (7,), (32,), (3, 16), (0,), (64,), (500,), (16,)]
    header = file({f"{n:02}": random_tensor(torch.uint8, shape, n) for n, shape in enumerate(shapes * 3)})
    want = load_file(header.path)
    got = {request.tag: tensor for request, tensor in read_staged(shared(header), device="cpu")}
    assert list(got) == list(header.tensors)
    assert all(same(got[name], want[name]) for name in want)
    storages = {tensor.untyped_storage().data_ptr() for tensor in got.values() if tensor.numel()}
    assert len(storages) < len([tensor for tensor in got.values() if tensor.numel()]), "nothing is shared"
    assert all(tensor.data_ptr() % 16 == 0 for tensor in got.values() if tensor.numel())


def test_what_lies_between_neighbours_keeps_its_own_memory(file, path_to_memory, sizes):
    """Weights that share memory have biases between them that are read to their places."""
    sizes(200, slots=3)
    tensors = {f"{n:02}": random_tensor(torch.uint8, (48,), n) for n in range(16)}
    a = file({name: tensors[name] for name in tensors if name < "08"}, "a.safetensors")
    b = file({name: tensors[name] for name in tensors if name >= "08"}, "b.safetensors")
    places = {name: torch.empty(48, dtype=torch.uint8) for name in ("01", "02", "05", "10")}
    asked = [*shared(a), *shared(b)]
    results = read_staged(asked, device="cpu", allocate=lambda request: places.get(request.tag))
    got = {request.tag: tensor for request, tensor in results}
    assert list(got) == list(tensors)
    assert all(same(got[name], tensors[name]) for name in tensors)
    assert all(got[name].data_ptr() == place.data_ptr() for name, place in places.items())
    storages = {name: got[name].untyped_storage().data_ptr() for name in tensors if name not in places}
    assert len(set(storages.values())) == 2, "one piece for each file"
    assert storages["00"] == storages["07"] != storages["08"] == storages["15"]


def test_a_piece_that_is_cut_short_gives_the_tensors_before_the_end(file, path_to_memory, sizes):
    sizes(1 << 16)
    header = file({f"{n:02}": random_tensor(torch.uint8, (32,), n) for n in range(20)})
    want, whole = load_file(header.path), header.path.read_bytes()
    got = {}

    def cut(fd, buffers, offset, read=os.preadv):
        count = read(fd, buffers, offset)
        end = header.tensors["07"].begin + 5
        return max(min(count, end - offset), 0)

    def collect():
        for request, tensor in read_staged(shared(header), device="cpu"):
            got[request.tag] = tensor.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", cut)
        with pytest.raises(CheckpointError, match="'07'"):
            collect()
    assert list(got) == [f"{n:02}" for n in range(7)]
    assert all(same(got[name], want[name]) for name in got)
    assert header.path.read_bytes() == whole
