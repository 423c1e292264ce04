"""What a contract takes for the rounding of a kernel, and what for a mistake, where results have eight bits."""

from dataclasses import replace

import pytest
import torch
from ltx2_engine.kernels import Rows, quantize_rows, residual_norm_modulate
from ltx2_engine.kernels.contract import CLOSE, EXACT
from ltx2_engine.kernels.quantized import Quantized

EPS = 1e-6


def made(seed=0):
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_a_unit_of_the_largest_value_is_many_steps_of_a_small_one():
    x = made()
    x[3, 5], x[3, 6] = 4.0, 0.01
    near = x.clone()
    near[3, 6] += 2**-7  # half a unit of 4 in bfloat16: what nearly cancels with a shift
    want, got = quantize_rows.definition(x), quantize_rows.definition(near)
    assert int(got.data[3, 6].view(torch.uint8)) - int(want.data[3, 6].view(torch.uint8)) > 4
    assert CLOSE.difference(want, got) is None
    assert EXACT.difference(want, got) is not None
    near[3, 6] += 0.25
    assert "times what is allowed" in CLOSE.difference(want, quantize_rows.definition(near))


def test_a_largest_value_one_unit_off_moves_its_row():
    x = made()
    x[3, 5] = 4.0
    near = x.clone()
    near[3, 5] = 4.03125
    want, got = quantize_rows.definition(x), quantize_rows.definition(near)
    assert int((want.data.view(torch.uint8) != got.data.view(torch.uint8)).sum()) > 4
    assert CLOSE.difference(want, got) is None
    near[3, 5] = 4.125
    assert CLOSE.difference(want, quantize_rows.definition(near)) == "other scales"


@pytest.mark.parametrize("share", [0.001, 0.5], ids=["few", "many"])
def test_steps_in_rows_of_the_same_scale_are_few(share):
    want = quantize_rows.definition(made())
    bits = want.data.view(torch.uint8).clone()
    changed = (torch.rand(bits.shape, generator=torch.Generator().manual_seed(1)) < share) & (bits & 0x7F < 0x70)
    bits[changed] += 1
    wrong = CLOSE.difference(want, Quantized(bits.view(torch.float8_e4m3fn), want.scale))
    assert "eight-bit numbers differ, 0 of them in 0 rows" in wrong


def test_nan_is_at_the_same_place():
    want = quantize_rows.definition(made())
    bits = want.data.view(torch.uint8).clone()
    bits[2, 3] = 0x7F
    got = Quantized(bits.view(torch.float8_e4m3fn), want.scale)
    assert CLOSE.difference(want, got) is not None
    assert CLOSE.difference(got, want) is not None
    assert CLOSE.difference(got, replace(got)) is None


def test_a_missing_rounding_and_another_row_of_the_modulation_are_refused():
    x, values = made()[None], made(1)[None, :3]
    scale, shift = Rows(values[:, :1]), Rows(values[:, 1:2])

    def eight_bit(shift, fast=False):
        return residual_norm_modulate.definition(x, ((scale, shift),), EPS, fast=fast, quantize=True)[1][0][1]

    want = eight_bit(shift)
    assert CLOSE.difference(want, eight_bit(shift)) is None
    assert CLOSE.difference(want, eight_bit(shift, fast=True)) is not None
    assert CLOSE.difference(want, eight_bit(Rows(values[:, 2:3]))) is not None
