"""Linear layers with something before or behind the product."""

import pytest
import torch
import torch.nn.functional as F
from ltx2_engine.kernels import Quantized, fp8_linear, gelu_linear, quantize_rows
from ltx2_engine.kernels.fp8_linear import dequantized_linear

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("fast", [False, True])
def test_gelu_linear_is_its_formula(fast):
    x, weight, bias = torch.randn(2, 5, 16).bfloat16(), torch.randn(32, 16).bfloat16(), torch.randn(32).bfloat16()
    want = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    assert torch.equal(gelu_linear(x, weight, bias, fast=fast), want)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_fp8_linear_is_near_the_product(rows, given):
    x, weight, bias = torch.randn(2, 5, 24), torch.randn(20, 24), torch.randn(20)
    peak = weight.abs().amax(1, keepdim=True) if rows else weight.abs().amax()
    packed = Quantized((weight / (peak / 448)).to(torch.float8_e4m3fn), peak / 448)
    scale = x.abs().amax() / 448 if given else None
    got = fp8_linear(x, packed, bias, torch.float32, scale)
    want = F.linear(x, weight, bias)
    assert got.shape == want.shape
    assert float((got - want).norm() / want.norm()) < 0.05
    quantized = quantize_rows(x, scale)
    assert torch.equal(
        fp8_linear(quantized, packed, bias, torch.float32), dequantized_linear(quantized, packed, bias, torch.float32)
    )


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("bias", [False, True])
def test_gelu_linear_on_the_gpu(bias):
    x = torch.randn(1, 1536, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16) / 64
    added = torch.randn(16384, device="cuda", dtype=torch.bfloat16) if bias else None
    fast, exact = (gelu_linear(x, weight, added, fast=fast).float() for fast in (True, False))
    want = F.gelu(F.linear(x.float(), weight.float(), None if added is None else added.float()), approximate="tanh")
    assert float((fast - want).norm()) <= 1.02 * float((exact - want).norm())


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [4096, 4090])
@pytest.mark.parametrize("whole", [(False, False), (False, True), (True, False), (True, True)])
def test_fp8_linear_on_the_gpu(whole, columns, bias):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs eight-bit matrix units")
    x = quantize_rows(torch.randn(1, 1536, 4096, device="cuda", dtype=torch.bfloat16))
    weight = quantize_rows(torch.randn(columns, 4096, device="cuda", dtype=torch.bfloat16))
    x, weight = (
        Quantized(q.data, q.scale[..., :1, :].clone() if one else q.scale)
        for q, one in zip((x, weight), whole, strict=True)
    )
    added = 50 * torch.randn(columns, device="cuda", dtype=torch.bfloat16) if bias else None
    got = fp8_linear(x, weight, added, torch.bfloat16).float()
    want = dequantized_linear(x, weight, added, torch.float32)
    # units of the eight-bit path's 14-bit sums and of bfloat16
    assert float((got - want).abs().max()) <= 2 * 2**-8 * float(want.abs().max())
    assert float((got - want).norm() / want.norm()) < 3e-3
