import math
import zlib

import pytest
import torch
from ltx2_engine.kernels import stochastic
from ltx2_engine.kernels.packed import repack
from ltx2_engine.kernels.stochastic import round_to_fp8, uniform

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# dtype -> mantissa bits, smallest exponent, largest number
GRID = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}


def hashed(index, key):
    """The random number of an element, in Python's unbounded integers."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    return (mix((mix(index) + key) % 2**32) >> 8) / 2**24


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_random_numbers_are_the_hash_of_key_and_index():
    key = zlib.crc32(b"0:a.weight")
    for start in (0, 12345, 2**31 - 200):
        got = uniform(start, 200, key, torch.device("cpu"))
        assert got.tolist() == [hashed(start + i, key) for i in range(200)]
    with pytest.raises(ValueError, match="at most 2147483648 elements"):
        uniform(2**31 - 1, 2, key, torch.device("cpu"))


def test_random_numbers_are_uniform_and_do_not_hang_together():
    count, bins = 1_000_000, 100
    u = uniform(0, count, 1, torch.device("cpu")).double()
    assert (u >= 0).all()
    assert (u < 1).all()
    observed = torch.histc(u, bins, 0, 1)
    chi_squared = float(((observed - count / bins) ** 2 / (count / bins)).sum())
    assert chi_squared < bins + 6 * math.sqrt(2 * bins)
    for shifted in (u.roll(1), u.roll(4096), uniform(0, count, 2, torch.device("cpu")).double()):
        assert abs(float(torch.corrcoef(torch.stack((u, shifted)))[0, 1])) < 6 / math.sqrt(count)


@pytest.mark.parametrize("dtype", GRID)
def test_each_element_is_rounded_by_the_formula(dtype):
    mantissa, smallest, largest = GRID[dtype]
    x = torch.cat((randn(2000) * 0.02, randn(2000) * 100 * largest / 448, randn(500) * 1e-4)).clamp(-largest, largest)
    got = round_to_fp8(x, dtype, name="a.weight").to(torch.float32).tolist()
    key = zlib.crc32(b"0:a.weight")
    for index, (value, rounded) in enumerate(zip(x.tolist(), got, strict=True)):
        a = abs(value)
        step = 2.0 ** (max(math.frexp(a)[1] - 1, smallest) - mantissa)
        up = 1 - hashed(index, key)  # in (0, 1]: what is just above a number of the grid may move
        y = (math.ceil(a / step + up) - 1) * step
        assert rounded == math.copysign(min(y, largest), value)
        assert rounded in (math.copysign(f(a / step) * step, value) for f in (math.floor, math.ceil))


@pytest.mark.parametrize("dtype", GRID)
def test_numbers_of_the_grid_stay(dtype):
    grid = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = grid[grid.to(torch.float32).isfinite()]
    for seed in range(200):
        again = round_to_fp8(finite.to(torch.float32), dtype, name="grid", seed=seed)
        assert torch.equal(again.view(torch.uint8), finite.view(torch.uint8))


def test_what_is_too_large_becomes_the_largest_and_nan_stays():
    x = torch.tensor([1e9, -449.0, float("inf"), -float("inf"), 448.0, float("nan")])
    got = round_to_fp8(x, E4M3, name="a").to(torch.float32)
    assert got[:5].tolist() == [448.0, -448.0, 448.0, -448.0, 448.0]
    assert got[5].isnan()


def test_result_depends_on_name_and_seed_and_on_nothing_else(monkeypatch):
    x = randn(300, 100) * 0.02
    first = round_to_fp8(x, E4M3, name="a").view(torch.uint8)
    assert first.shape == x.shape
    assert torch.equal(round_to_fp8(x, E4M3, name="a").view(torch.uint8), first)
    assert not torch.equal(round_to_fp8(x, E4M3, name="b").view(torch.uint8), first)
    assert not torch.equal(round_to_fp8(x, E4M3, name="a", seed=1).view(torch.uint8), first)
    monkeypatch.setattr(stochastic, "_CHUNK", 777)
    torch.manual_seed(9)
    assert torch.equal(round_to_fp8(x, E4M3, name="a").view(torch.uint8), first)
    assert torch.equal(repack("fp8_cast", x, {"data": first.view(E4M3)}, name="a")["data"].view(torch.uint8), first)


@pytest.mark.parametrize("std", [0.02, 0.1, 1.0])
def test_small_changes_survive_in_the_mean_where_rounding_to_nearest_loses_them(std):
    """Projection of the applied change on the wanted one over a million weights; its own statistical error is 4e-3."""
    base = (randn(1000, 1000) * std).to(E4M3)
    delta = randn(1000, 1000, seed=1) * 0.005 * std

    def survives(changed):
        applied = changed.to(torch.float64) - base.to(torch.float64)
        return float((applied * delta).sum() / (delta.double() ** 2).sum())

    changed = base.to(torch.float32) + delta
    got = survives(repack("fp8_cast", changed, {"data": base}, name="w")["data"])
    nearest = survives(changed.to(E4M3))
    print(f"std {std}: {got:.4f}, to nearest {nearest:.4f}")
    assert abs(got - 1) <= 2e-2
    assert nearest < 0.3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GRID)
def test_the_device_rounds_to_the_same_bits(dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.cat((randn(5_000_000) * 0.02, randn(1000) * 300))
    here = round_to_fp8(x, dtype, name="w")
    there = round_to_fp8(x.cuda(), dtype, name="w")
    assert torch.equal(here.view(torch.uint8), there.cpu().view(torch.uint8))
