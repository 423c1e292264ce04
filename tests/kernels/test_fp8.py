import math

import numpy as np
import pytest
import torch
from ltx2_engine.kernels.fp8 import pack_fp8, scale_kind
from ltx2_engine.kernels.packed import repack, unpack

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# dtype -> mantissa bits, bias, largest number
LAYOUT = {E4M3: (3, 7, 448.0), E5M2: (2, 15, 57344.0)}
SHAPE = (150, 260)
SCALES = {"tensor": (), "one": (1,), "one by one": (1, 1), "rows": (150,), "row": (150, 1), "block": (2, 3)}


def decoded(byte, dtype):
    """The number of a byte, from the definition: sign, exponent, mantissa."""
    mantissa_bits, bias, _ = LAYOUT[dtype]
    sign = -1.0 if byte & 128 else 1.0
    exponent, mantissa = (byte & 127) >> mantissa_bits, (byte & (2**mantissa_bits - 1)) / 2**mantissa_bits
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias)
    return sign * (1 + mantissa) * 2.0 ** (exponent - bias)


def finite_bytes(dtype):
    last = {E4M3: 0x7E, E5M2: 0x7B}[dtype]
    return [byte for byte in range(256) if byte & 127 <= last]


def random_parts(dtype, scale_shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    choice = torch.tensor(finite_bytes(dtype), dtype=torch.uint8)
    data = choice[torch.randint(len(choice), SHAPE, generator=generator)].view(dtype)
    return {"data": data, "scale": torch.rand(scale_shape, generator=generator) * 0.01 + 1e-4}


def scale_of(scale, row, column):
    """The number of a scale that an element takes, as loops would look it up."""
    if scale.numel() == 1:
        return scale.reshape(()).item()
    if scale.shape in ((SHAPE[0],), (SHAPE[0], 1)):
        return scale.reshape(-1)[row].item()
    return scale[row // 128, column // 128].item()


@pytest.mark.parametrize("dtype", LAYOUT)
@pytest.mark.parametrize("kind", SCALES)
def test_unpacking_is_the_number_of_each_byte_times_its_scale(dtype, kind):
    parts = random_parts(dtype, SCALES[kind])
    got = unpack("fp8", parts, SHAPE, torch.float32)
    raw = parts["data"].view(torch.uint8)
    positions = [(0, 0), (149, 259), (127, 128), (128, 127), (128, 255), (128, 256)]
    positions += [(i * 7 % SHAPE[0], i * 11 % SHAPE[1]) for i in range(500)]
    for row, column in positions:
        number = np.float32(decoded(raw[row, column].item(), dtype))
        want = number * np.float32(scale_of(parts["scale"], row, column))
        assert got[row, column].item() == want
    assert torch.equal(unpack("fp8", parts, SHAPE, torch.bfloat16), got.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", LAYOUT)
def test_a_cast_is_the_number_of_each_byte(dtype):
    raw = finite_bytes(dtype)
    data = torch.tensor(raw, dtype=torch.uint8).view(dtype)
    got = unpack("fp8_cast", {"data": data}, data.shape, torch.float32)
    assert got.tolist() == [decoded(byte, dtype) for byte in raw]


def test_kinds_of_scales():
    assert scale_kind((), (5, 7)) == scale_kind((1,), (5, 7)) == "tensor"
    assert scale_kind((5,), (5, 7)) == scale_kind((5, 1), (5, 7)) == "row"
    assert scale_kind((2, 3), (129, 300)) == "block"
    for odd in ((7,), (1, 7), (2,), (2, 2), (3, 2), (5, 7), (5, 1, 1)):
        assert scale_kind(odd, (5, 7)) is None
    with pytest.raises(ValueError, match=r"scale of shape \[7\] does not fit a weight of shape \[150, 260\]"):
        unpack("fp8", {**random_parts(E4M3, ()), "scale": torch.ones(7)}, SHAPE, torch.float32)


@pytest.mark.parametrize("dtype", LAYOUT)
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_repacking_takes_a_new_scale_and_errs_by_half_a_step_at_most(dtype, kind, scale_dtype):
    mantissa_bits, bias, largest = LAYOUT[dtype]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(SHAPE, generator=generator) * 0.02 * torch.linspace(0.1, 3, SHAPE[0])[:, None]
    old = {**random_parts(dtype, SCALES[kind]), "input_scale": torch.tensor(0.3)}
    old["scale"] = old["scale"].to(scale_dtype)
    new = repack("fp8", weight, old, name="w")
    assert new.keys() == old.keys()
    assert new["input_scale"] is old["input_scale"]
    for role in ("data", "scale"):
        assert (new[role].dtype, new[role].shape) == (old[role].dtype, old[role].shape)
    for row, column in [(i * 7 % SHAPE[0], i * 11 % SHAPE[1]) for i in range(400)]:
        scale = scale_of(new["scale"], row, column)
        wanted = weight[row, column].item() / scale
        got = decoded(new["data"].view(torch.uint8)[row, column].item(), dtype)
        step = 2.0 ** (max(math.frexp(wanted)[1] - 1, 1 - bias) - mantissa_bits)
        # a scale in bfloat16 may cut the very largest numbers: 448 * 2^-9 of it
        slack = 0.5 if scale_dtype == torch.float32 else 0.5 + 0.25 * (abs(wanted) > largest)
        assert abs(got - wanted) <= slack * step * (1 + 1e-6)
    if scale_dtype == torch.float32 and kind == "tensor":
        assert new["scale"].item() == pytest.approx(weight.abs().max().item() / largest, rel=1e-6)
        assert new["data"].to(torch.float32).abs().max() == largest


def test_new_scales_cover_their_row_or_block_alone():
    weight = torch.full((256, 256), 0.01)
    weight[200, 5], weight[3, 250] = 7.0, -3.0
    _, rows = pack_fp8(weight, torch.empty(256, 1))
    assert rows[200].item() == pytest.approx(7 / 448)
    assert rows[3].item() == pytest.approx(3 / 448)
    assert rows[4].item() == pytest.approx(0.01 / 448)
    _, blocks = pack_fp8(weight, torch.empty(2, 2))
    assert blocks.flatten().tolist() == pytest.approx([0.01 / 448, 3 / 448, 7 / 448, 0.01 / 448])


def test_a_weight_of_zeros_stays_one():
    old = random_parts(E4M3, (150, 1))
    new = repack("fp8", torch.zeros(SHAPE), old, name="w")
    assert (unpack("fp8", new, SHAPE, torch.float32) == 0).all()
    assert (new["scale"] > 0).all()


def test_repacking_what_was_packed_changes_nothing():
    """A base that a new scale is made for is already on that scale's grid."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    data, scale = pack_fp8(weight, torch.empty(()))
    again = repack(
        "fp8",
        unpack("fp8", {"data": data, "scale": scale}, SHAPE, torch.float32),
        {"data": data, "scale": scale},
        name="w",
    )
    assert torch.equal(again["data"].view(torch.uint8), data.view(torch.uint8))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8", "q4_k", "plain"])
def test_other_formats_are_not_repacked(format):
    with pytest.raises(ValueError, match=f"'{format}' is not stored again; fp8, fp8_cast are"):
        repack(format, torch.zeros(2, 2), {"data": torch.zeros(1)}, name="w")


def test_unknown_formats_are_refused_by_name():
    with pytest.raises(ValueError, match="'int8' is not one of fp8, fp8_cast, mxfp8, nvfp4"):
        unpack("int8", {"data": torch.zeros(1)}, (1, 1), torch.float32)
