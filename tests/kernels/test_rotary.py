"""Rotation, alone and after the norm of queries and keys, against the definitions."""

import pytest
import torch
from ltx2_engine.kernels import apply_split_rotary, norm_rotary, qk_norm_rotary

EPS = 1e-6
HALF = [torch.bfloat16, torch.float16]


def tables(randn, batch, heads, tokens, half, dtype=torch.bfloat16, *, transposed=False):
    angle = randn(batch, tokens, heads, half, dtype=torch.float32).transpose(1, 2)
    angle = angle if transposed else angle.contiguous()
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("table_batch", [1, 2])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rotation(agree, randn, dtype, table_batch, transposed, fast):
    x = randn(2, 5, 4 * 16, dtype=dtype).unflatten(-1, (4, 16)).transpose(1, 2)
    agree(apply_split_rotary, x, *tables(randn, table_batch, 4, 5, 8, dtype, transposed=transposed), fast=fast)


def test_rotation_of_heads_first_memory_and_many_tokens(agree, randn):
    agree(apply_split_rotary, randn(1, 4, 63, 16), *tables(randn, 1, 4, 63, 8))


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize("table_batch", [1, 2])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_queries_and_keys_of_one_projection(agree, randn, dtype, table_batch, fast):
    fused = randn(2, 5, 3 * 64, dtype=dtype)
    q, k, _ = fused.chunk(3, -1)
    weights = randn(64, dtype=dtype), randn(64, dtype=dtype)
    got = agree(qk_norm_rotary, q, k, *weights, *tables(randn, table_batch, 4, 5, 8, dtype), EPS, fast=fast)
    assert all(out.is_contiguous() for out in got)


@pytest.mark.parametrize("tokens", [1, 63])
def test_one_tensor(agree, randn, tokens):
    x = randn(1, tokens, 64)
    agree(norm_rotary, x, randn(64), *tables(randn, 1, 4, tokens, 8, transposed=True), EPS)


def test_special_numbers(agree, randn):
    q, k = randn(1, 5, 64), randn(1, 5, 64)
    q[0, 0] = 0
    q[0, 1, 3] = float("nan")
    q[0, 2, 4] = float("inf")
    q[0, 3] *= 1e18
    got, _ = agree(qk_norm_rotary, q, k, randn(64), randn(64), *tables(randn, 1, 4, 5, 8), EPS)
    assert got[0, 1].isnan().all()
    assert (got[0, 0] == 0).all()


def test_the_rounding_of_the_product_matters(randn, device):
    x, cos_sin = randn(1, 4, 63, 16), tables(randn, 1, 4, 63, 8)
    exact, fast = (apply_split_rotary.twin(x, *cos_sin, fast=fast) for fast in (False, True))
    assert 0.1 < float((exact != fast).float().mean()) < 0.4


def test_operator_and_compilation(randn, device, traced):
    from ltx2_engine.kernels.rotary_triton import launch

    q, k, weight, (cos, sin) = randn(2, 5, 64), randn(2, 5, 64), randn(64), tables(randn, 1, 4, 5, 8)
    by_head = [t.unflatten(-1, (4, 16)) for t in (q, k)]
    torch.library.opcheck(launch.registered, (*by_head, weight, weight, cos, sin, EPS, False))
    torch.library.opcheck(launch.registered, (by_head[0], None, None, None, cos, sin, 0.0, True))

    def call(q, k):
        return qk_norm_rotary(q, k, weight, weight, cos, sin, EPS)

    want = call(q, k)
    got, operators = traced(call, q, k)
    assert operators == {"ltx2_engine.split_rotary.default"}
    assert qk_norm_rotary.contract.difference(want, got) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("heads", "half"), [(32, 64), (32, 32)])
def test_full_size(agree, heads, half):
    width = heads * half * 2
    fused = torch.randn(1, 15360, 3 * width, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.chunk(3, -1)
    angle = torch.rand(1, heads, 15360, half, device="cuda") * 6
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    weights = torch.randn(2, width, device="cuda", dtype=torch.bfloat16)
    agree(qk_norm_rotary, q, k, *weights, cos, sin, EPS)
    agree(norm_rotary, q, weights[0], cos, sin, EPS)
    agree(apply_split_rotary, v.unflatten(-1, (heads, -1)).transpose(1, 2), cos, sin)
