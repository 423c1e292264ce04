"""The renoising step against its definition."""

import pytest
import torch
from ltx2_engine.kernels import res2s_update

LEVELS = {"sigma": 0.8123, "sigma_next": 0.4, "sigma_down": 0.3001, "alpha_ratio": 0.97, "fresh": 0.2}


@pytest.mark.parametrize("noise", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equal_bits(randn, dtype, noise):
    x, target, fresh = randn(2, 63, 16, dtype=dtype), randn(2, 63, 16, dtype=dtype), randn(2, 63, 16, dtype=noise)
    got, want = (run(x, target, fresh, **LEVELS) for run in (res2s_update.twin, res2s_update.definition))
    assert torch.equal(got, want)


def test_no_noise(agree, randn):
    agree(res2s_update, *(randn(2, 63, 16, dtype=torch.float64) for _ in range(3)), **{**LEVELS, "fresh": 0.0})


def test_operator_and_compilation(randn, device, traced):
    from ltx2_engine.kernels.res2s_update_triton import launch

    x, target, noise = (randn(1, 5, 32, dtype=torch.float64) for _ in range(3))
    torch.library.opcheck(launch.registered, (x, target, noise, *LEVELS.values()))

    def call(x, target, noise):
        return res2s_update(x, target, noise, **LEVELS)

    want = call(x, target, noise)
    got, operators = traced(call, x, target, noise)
    assert operators == {"ltx2_engine.res2s_update.default"}
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_full_size(agree):
    agree(res2s_update, *torch.randn(3, 1, 15360, 128, device="cuda", dtype=torch.float64), **LEVELS)
