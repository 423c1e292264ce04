"""Guidance in one or two passes against its definition."""

import itertools

import pytest
import torch
from ltx2_engine.kernels import guidance_combine

STRENGTHS = {"cfg": 3.1, "stg": 0.7, "modality": 2.9}


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("present", list(itertools.product((True, False), repeat=3)), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_passes(agree, randn, dtype, present, rescale):
    cond, *others = (randn(1, 63, 128, dtype=dtype) for _ in range(4))
    chosen = [other if there else None for other, there in zip(others, present, strict=True)]
    agree(guidance_combine, cond, *chosen, **STRENGTHS, rescale=rescale)


def test_far_mean_and_special_numbers(agree, randn):
    cond, uncond = randn(2, 40, 128, dtype=torch.float32) + 100, randn(2, 40, 128, dtype=torch.float32) + 100
    agree(guidance_combine, cond, uncond, None, None, **STRENGTHS, rescale=0.5)
    cond[0, 0, 0] = float("nan")
    got = agree(guidance_combine, cond, uncond, None, None, **STRENGTHS, rescale=0.5)
    assert got.isnan().all()


def test_operator_and_compilation(randn, device, traced):
    from ltx2_engine.kernels.guidance_combine_triton import launch

    cond, uncond = randn(1, 5, 32), randn(1, 5, 32)
    torch.library.opcheck(launch.registered, (cond, uncond, None, None, 3.0, 0.0, 1.0, 0.7))

    def call(cond, uncond):
        return guidance_combine(cond, uncond, None, None, **STRENGTHS, rescale=0.7)

    want = call(cond, uncond)
    got, operators = traced(call, cond, uncond)
    assert operators == {"ltx2_engine.guidance_combine.default"}
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_size(agree, dtype):
    passes = torch.randn(4, 1, 15360, 128, device="cuda", dtype=dtype)
    first = agree(guidance_combine, *passes, **STRENGTHS, rescale=0.7)
    assert torch.equal(first, guidance_combine.twin(*passes, **STRENGTHS, rescale=0.7))
