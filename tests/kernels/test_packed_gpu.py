"""Packed formats on a device: the same bits as on the CPU, no waiting, and a bounded amount of memory."""

import pytest
import torch
from ltx2_engine.kernels.fp8 import pack_fp8
from ltx2_engine.kernels.ggml import BLOCKS, packed_bytes
from ltx2_engine.kernels.mxfp8 import pack_mxfp8
from ltx2_engine.kernels.nvfp4 import pack_nvfp4
from ltx2_engine.kernels.packed import repack, unpack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = (2048, 4096)
FP8_SCALES = {"fp8": (), "fp8 row": (2048, 1), "fp8 block": (16, 32)}
NAMES = [*FP8_SCALES, "fp8_cast", "mxfp8", "nvfp4", *BLOCKS]


def packed(name):
    """Format and parts of a random weight, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    if name in BLOCKS:
        count = packed_bytes(name, SHAPE)
        # bytes below 124: no fp16 number made of two of them is infinite
        return name, {"data": torch.randint(0, 124, (count,), dtype=torch.uint8, generator=generator)}
    weight = torch.randn(SHAPE, generator=generator) * 0.02
    if name in FP8_SCALES:
        data, scale = pack_fp8(weight, torch.empty(FP8_SCALES[name]))
        return "fp8", {"data": data, "scale": scale}
    if name == "fp8_cast":
        return name, {"data": weight.to(torch.float8_e4m3fn)}
    roles = ("data", "scale", "scale_2")
    return name, dict(zip(roles, (pack_mxfp8 if name == "mxfp8" else pack_nvfp4)(weight), strict=False))


def on_device(parts):
    return {role: tensor.cuda() for role, tensor in parts.items()}


def same_bits(here, there):
    as_bytes = [tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (here, there)]
    return here.dtype == there.dtype and torch.equal(*as_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_unpacking_gives_the_same_bits(name, dtype):
    format, parts = packed(name)
    assert same_bits(unpack(format, parts, SHAPE, dtype), unpack(format, on_device(parts), SHAPE, dtype))


@pytest.mark.parametrize("name", [*FP8_SCALES, "fp8_cast"])
def test_repacking_gives_the_same_bits(name):
    format, parts = packed(name)
    weight = unpack(format, parts, SHAPE, torch.float32)
    weight += torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 1e-3
    here = repack(format, weight, parts, name="w")
    there = repack(format, weight.cuda(), on_device(parts), name="w")
    assert all(same_bits(here[role], there[role]) for role in here)


@pytest.mark.parametrize("pack", [pack_mxfp8, pack_nvfp4])
def test_packing_gives_the_same_bits(pack):
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    assert all(same_bits(here, there) for here, there in zip(pack(weight), pack(weight.cuda()), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name):
    format, parts = packed(name)
    parts = on_device(parts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        weight = unpack(format, parts, SHAPE, torch.bfloat16)
        if format in ("fp8", "fp8_cast"):
            repack(format, weight.float(), parts, name="w")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_unpacking_takes_a_few_times_one_weight(name):
    format, parts = packed(name)
    parts = on_device(parts)
    unpack(format, parts, SHAPE, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    unpack(format, parts, SHAPE, torch.bfloat16)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"{name}: {peak / (2 * SHAPE[0] * SHAPE[1]):.1f} times the bfloat16 weight")
    assert peak <= 6 * 2 * SHAPE[0] * SHAPE[1]
