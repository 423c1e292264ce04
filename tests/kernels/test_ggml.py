import numpy as np
import pytest
import torch
from ltx2_engine.kernels.ggml import BLOCKS, packed_bytes
from ltx2_engine.kernels.packed import unpack

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

FORMATS = sorted(BLOCKS)
# where the fp16 numbers of a block lie
HALVES = {"q8_0": (0,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}


def kind(format):
    return gguf.GGMLQuantizationType[format.upper()]


def random_blocks(format, count, seed=0):
    """Blocks of random bits, with finite fp16 numbers of every size and sign."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, BLOCKS[format].bytes), dtype=np.uint8)
    for position in HALVES[format]:
        halves = rng.integers(0, 2**16, count, dtype=np.uint16)
        halves[(halves & 0x7C00) == 0x7C00] ^= 0x4000
        blocks[:, position : position + 2] = halves[:, None].view(np.uint8)
    return blocks


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_of_blocks_are_those_of_ggml(format):
    assert tuple(BLOCKS[format]) == gguf.GGML_QUANT_SIZES[kind(format)]
    assert packed_bytes(format, (3, 512)) == 3 * 512 // BLOCKS[format].weights * BLOCKS[format].bytes


@pytest.mark.parametrize("format", FORMATS)
def test_unpacking_equals_gguf_bit_for_bit(format):
    blocks = random_blocks(format, 4096)
    want = torch.from_numpy(gguf.quants.dequantize(blocks.reshape(64, -1), kind(format)).copy())
    got = unpack(format, {"data": torch.from_numpy(blocks.reshape(-1))}, want.shape, torch.float32)
    assert got.shape == want.shape
    assert torch.equal(bits(got), bits(want))
    assert want.abs().max() > 1
    assert want.abs().unique().numel() > 1000


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_the_float32_result_rounded_once(format, dtype):
    data = torch.from_numpy(random_blocks(format, 64, seed=1).reshape(-1))
    shape = (8, 8 * BLOCKS[format].weights)
    wide = unpack(format, {"data": data}, shape, torch.float32)
    assert torch.equal(unpack(format, {"data": data}, shape, dtype), wide.to(dtype))


def test_what_gguf_quantises_comes_back_within_half_a_step():
    weight = np.random.default_rng(3).standard_normal((16, 256), dtype=np.float32)
    packed = gguf.quants.quantize(weight, kind("q8_0"))
    got = unpack("q8_0", {"data": torch.from_numpy(packed.reshape(-1))}, (16, 256), torch.float32)
    step = np.abs(weight.reshape(-1, 32)).max(1, keepdims=True) / 127
    # the step itself is stored in fp16: up to 127 of it, each off by 2^-11
    assert (np.abs(got.numpy() - weight).reshape(-1, 32) <= (0.5 + 127 / 2048) * step).all()


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_the_device_computes_the_same_bits(format):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    data = torch.from_numpy(random_blocks(format, 4096).reshape(-1))
    shape = (64, 64 * BLOCKS[format].weights)
    here = unpack(format, {"data": data}, shape, torch.bfloat16)
    there = unpack(format, {"data": data.cuda()}, shape, torch.bfloat16)
    assert torch.equal(here.view(torch.int16), there.cpu().view(torch.int16))
