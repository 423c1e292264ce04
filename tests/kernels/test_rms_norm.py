"""The norm of queries and keys that have no positions against its definition."""

import pytest
import torch
from ltx2_engine.kernels import rms_norm

EPS = 1e-6
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_part_of_a_projection(agree, randn, dtype, width):
    fused = randn(2, 5, 2 * width, dtype=dtype)
    got = agree(rms_norm, fused[..., :width], randn(width, dtype=dtype), EPS)
    assert got.is_contiguous()


@pytest.mark.parametrize("tokens", [1, 63])
def test_tokens(agree, randn, tokens):
    agree(rms_norm, randn(1, tokens, 64), randn(64), EPS)


def test_special_numbers(agree, randn):
    x = randn(1, 5, 64)
    x[0, 0] = 0
    x[0, 1, 3] = float("nan")
    x[0, 2, 4] = float("inf")
    x[0, 3] *= 1e18
    got = agree(rms_norm, x, randn(64), EPS)
    assert got[0, 1].isnan().all()
    assert (got[0, 0] == 0).all()


def test_operator_and_compilation(randn, device, traced):
    from ltx2_engine.kernels.rms_norm_triton import launch

    x, weight = randn(2, 5, 64), randn(64)
    torch.library.opcheck(launch.registered, (x, weight, EPS))
    want = rms_norm(x, weight, EPS)
    got, operators = traced(lambda x: rms_norm(x, weight, EPS), x)
    assert operators == {"ltx2_engine.rms_norm.default"}
    assert rms_norm.contract.difference(want, got) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [2048, 4096])
def test_full_size(agree, width):
    fused = torch.randn(1, 15360, 2 * width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    agree(rms_norm, fused[..., :width], weight, EPS)
