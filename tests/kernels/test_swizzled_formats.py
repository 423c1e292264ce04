"""NVFP4 and MXFP8 against loops written from their definitions, and against ComfyUI's library of formats."""

import math

import numpy as np
import pytest
import torch
from ltx2_engine.kernels.mxfp8 import pack_mxfp8
from ltx2_engine.kernels.nvfp4 import pack_nvfp4
from ltx2_engine.kernels.packed import unpack
from ltx2_engine.kernels.swizzle import padded_shape, swizzle, unswizzle

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# rows beyond one tile, columns beyond four scales, both with padding
SHAPE = (130, 160)


def offset(row, column, columns):
    """Where the scale (row, column) of so many columns lies."""
    padded = (columns + 3) // 4 * 4
    tile = (row // 128) * (padded // 4) + column // 4
    return tile * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + column % 4


def random_bytes(shape, seed, low=0, high=256):
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 4), (130, 10), (300, 5), (32, 64)])
def test_scales_lie_where_the_formula_says(rows, columns):
    height, width = padded_shape(rows, columns)
    assert (height % 128, width % 4) == (0, 0)
    assert height - rows < 128
    assert width - columns < 4
    stored = torch.arange(height * width).view(height, width)
    natural = unswizzle(stored, rows, columns)
    want = [[offset(row, column, columns) for column in range(columns)] for row in range(rows)]
    assert natural.tolist() == want
    assert torch.equal(unswizzle(swizzle(natural), rows, columns), natural)


def test_nvfp4_equals_a_loop_over_its_definition():
    rows, columns = SHAPE
    data = random_bytes((rows, columns // 2), 0)
    scale = random_bytes(padded_shape(rows, columns // 16), 1, 0, 0x7F).view(torch.float8_e4m3fn)
    scale_2 = torch.tensor(0.00371, dtype=torch.float32)
    got = unpack("nvfp4", {"data": data, "scale": scale, "scale_2": scale_2}, SHAPE, torch.float32)
    flat, packed = scale.to(torch.float32).flatten().tolist(), data.tolist()
    want = np.zeros(SHAPE, dtype=np.float32)
    for row in range(rows):
        for column in range(columns):
            byte = packed[row][column // 2]
            code = byte >> 4 if column % 2 == 0 else byte & 15
            value = np.float32(E2M1[code & 7] * (-1 if code & 8 else 1))
            block = np.float32(flat[offset(row, column // 16, columns // 16)])
            want[row, column] = value * (block * np.float32(scale_2.item()))
    assert torch.equal(got, torch.from_numpy(want))
    assert torch.equal(
        unpack("nvfp4", {"data": data, "scale": scale, "scale_2": scale_2.reshape(1)}, SHAPE, torch.bfloat16),
        got.to(torch.bfloat16),
    )


@pytest.mark.parametrize("as_bytes", [True, False])
def test_mxfp8_equals_a_loop_over_its_definition(as_bytes):
    rows, columns = SHAPE
    data = (random_bytes(SHAPE, 2) & 0xF7).view(torch.float8_e4m3fn)  # no NaN: 0x7F and 0xFF cannot occur
    scale = random_bytes(padded_shape(rows, columns // 32), 3, 0, 255)
    scale[0, :3] = torch.tensor([0, 1, 254], dtype=torch.uint8)
    stored = scale if as_bytes else scale.view(torch.float8_e8m0fnu)
    got = unpack("mxfp8", {"data": data, "scale": stored}, SHAPE, torch.float32)
    codes, values = scale.flatten().tolist(), data.to(torch.float32).tolist()
    for row in range(rows):
        for column in range(columns):
            power = math.ldexp(1.0, codes[offset(row, column // 32, columns // 32)] - 127)
            want = np.float32(values[row][column] * power) if abs(values[row][column] * power) < 2.0**128 else None
            if want is not None:
                assert got[row, column].item() == want


def test_mxfp8_code_255_is_not_a_number():
    scale = torch.full((128, 4), 255, dtype=torch.uint8)
    data = torch.ones(1, 32).to(torch.float8_e4m3fn)
    assert unpack("mxfp8", {"data": data, "scale": scale}, (1, 32), torch.float32).isnan().all()


@pytest.fixture(scope="module")
def weight():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(SHAPE, generator=generator) * torch.randn(SHAPE[0], 1, generator=generator).exp()


def test_packing_to_nvfp4_errs_by_half_a_step(weight):
    data, scale, scale_2 = pack_nvfp4(weight)
    assert scale_2.item() == pytest.approx(weight.abs().max().item() / 2688, rel=1e-6)
    got = unpack("nvfp4", {"data": data, "scale": scale, "scale_2": scale_2}, SHAPE, torch.float32)
    blocks = (weight - got).abs().view(-1, 16).amax(1), weight.abs().view(-1, 16).amax(1)
    # the widest step is 2 of 6, and the block's scale itself is rounded by 1/16, or by half a subnormal of 2^-9
    assert (blocks[0] <= blocks[1] * (1 / 6 + 1 / 16) + 6 * 2.0**-10 * scale_2).all()


def test_packing_to_mxfp8_errs_by_half_a_step(weight):
    data, scale = pack_mxfp8(weight)
    got = unpack("mxfp8", {"data": data, "scale": scale}, SHAPE, torch.float32)
    blocks = (weight - got).abs().view(-1, 32).amax(1), weight.abs().view(-1, 32).amax(1)
    assert (blocks[0] <= blocks[1] * 2.0**-4).all()


@pytest.mark.parametrize("dtype", [torch.float32])
def test_comfyuis_library_packs_and_unpacks_the_same(weight, dtype):
    kitchen = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    peak = weight.abs().max() / 2688
    theirs = kitchen.quantize_nvfp4(weight, peak)
    ours = pack_nvfp4(weight)
    assert torch.equal(theirs[0], ours[0])
    assert torch.equal(theirs[1].view(torch.uint8), ours[1].view(torch.uint8))
    want = kitchen.dequantize_nvfp4(theirs[0], peak, theirs[1], dtype)[: SHAPE[0], : SHAPE[1]]
    parts = {"data": theirs[0], "scale": theirs[1], "scale_2": peak}
    assert torch.equal(unpack("nvfp4", parts, SHAPE, dtype), want)
    data, scale = kitchen.quantize_mxfp8(weight)
    assert torch.equal(scale.view(torch.uint8), pack_mxfp8(weight)[1])
    want = kitchen.dequantize_mxfp8(data, scale, dtype)[: SHAPE[0], : SHAPE[1]]
    assert torch.equal(unpack("mxfp8", {"data": data, "scale": scale}, SHAPE, dtype), want)
