"""Attention to parts of the keys: what each part returns, and that merged parts are the whole."""

import pytest
import torch
import torch.nn.functional as F
from ltx2_engine.ltx2_core.testing import assert_close
from ltx2_engine.ltx2_core.transformer.attend import attend_part
from ltx2_engine.ltx2_core.transformer.heads import merge_parts

# of the merged result and of one that is not split, against float64
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}


def tensors(dtype, keys=23):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, count, 16, generator=generator).to(dtype) for count in (5, keys, keys)]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_part_returns_its_attention_and_the_logarithm_of_its_sum(dtype):
    q, k, v = tensors(dtype)
    out, sums = attend_part(q, k, v)
    scores = q.double() @ k.double().mT / 4
    assert out.dtype == dtype
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close("out", out, scores.softmax(-1) @ v.double(), TOLERANCE[dtype])
    # exponentials of sixteen-bit scores are approximate on the CPU
    assert_close("sums", sums, scores.logsumexp(-1), 1e-4 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ends", [(23,), (7, 11, 23), (7, 7, 11, 23), (1, 23, 23), (0, 4, 23)])
def test_merged_parts_are_the_whole(dtype, ends):
    """Uneven parts, and some without keys."""
    q, k, v = tensors(dtype)
    parts = [
        attend_part(q, k[:, :, begin:end], v[:, :, begin:end]) for begin, end in zip((0, *ends), ends, strict=False)
    ]
    merged = merge_parts(*map(torch.stack, zip(*parts, strict=True)))
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert merged.dtype == dtype
    assert_close("merged", merged, want, TOLERANCE[dtype])


def test_a_part_without_keys_weighs_nothing():
    q, k, v = tensors(torch.float32)
    out, sums = attend_part(q, k[:, :, :0], v[:, :, :0])
    assert not out.any()
    assert bool((sums == -torch.inf).all())
    whole = attend_part(q, k, v)
    merged = merge_parts(torch.stack((out, whole[0])), torch.stack((sums, whole[1])))
    assert torch.equal(merged, whole[0])


def test_scores_of_any_size_merge():
    q, k, v = tensors(torch.float64)
    parts = [attend_part(q * 1e3, k[:, :, part], v[:, :, part]) for part in (slice(0, 9), slice(9, None))]
    merged = merge_parts(*map(torch.stack, zip(*parts, strict=True)))
    assert_close("merged", merged, F.scaled_dot_product_attention(q * 1e3, k, v), 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("queries", [1, 26, 126])
@pytest.mark.parametrize("width", [16, 64])
def test_parts_on_a_gpu(dtype, queries, width):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, count, 4 * width, generator=generator, device="cuda").to(dtype).unflatten(2, (4, -1))
        for count in (queries, 300, 300)
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    parts = [attend_part(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 100), slice(100, 300), slice(0, 0))]
    assert all(sums.shape == q.shape[:3] for _, sums in parts)
    merged = merge_parts(*map(torch.stack, zip(*parts, strict=True)))
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert_close("merged", merged.cpu(), want.cpu(), 10 * TOLERANCE[dtype])
