import pytest
import torch
from ltx2_engine.ltx2_core.loading.lora import products

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def factors(dtype, shape=(96, 8, 64), seed=0, device="cpu"):
    outputs, rank, inputs = shape
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(outputs, rank, generator=generator)
    a = torch.randn(rank, inputs, generator=generator)
    return b.to(dtype).to(device), a.to(dtype).to(device)


def error_in_ulp(got, b, a):
    """Largest error in units of float32's last bit of the sum of the products' sizes."""
    exact = b.double() @ a.double()
    size = b.double().abs() @ a.double().abs()
    return float(((got.double() - exact).abs() / size).max()) * 2**24


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_float32_products(dtype):
    b, a = factors(dtype)
    assert error_in_ulp(products.product(b, a), b, a) < 4
    total = torch.ones(96, 64)
    assert products.add_product(total, b, a, -0.5) is total
    torch.testing.assert_close(total, (1 - 0.5 * (b.double() @ a.double())).float(), rtol=1e-6, atol=1e-6)


def test_parts_of_float32_factors_multiply_like_them():
    b, a = factors(torch.float32, (64, 384, 64))
    parts_b, parts_a = products._in_parts(b, a)
    assert parts_b.dtype == parts_a.dtype == torch.bfloat16
    assert parts_b.shape == (64, 6 * 384)
    # in float64, so that only what the parts leave out is seen
    assert error_in_ulp(parts_b.double() @ parts_a.double(), b, a) < 0.5
    # the six products are needed: without the last kind the error shows
    assert error_in_ulp(parts_b[:, 3 * 384 :].double() @ parts_a[3 * 384 :].double(), b, a) > 0.5


def test_three_parts_hold_every_bit():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * torch.exp2(torch.arange(4096.0) % 200 - 100)
    assert torch.equal(sum(part.double() for part in products._parts(x)), x.double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 8, 64), (512, 384, 1024), (33, 5, 7)])
def test_products_on_a_gpu_are_float32_products_whatever_the_switches_say(dtype, shape):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.allow_fp16_accumulation
    b, a = factors(dtype, shape, device="cuda")
    plain = products.product(b, a)
    try:
        matmul.allow_tf32 = matmul.allow_fp16_accumulation = True
        switched = products.product(b, a)
    finally:
        matmul.allow_tf32, matmul.allow_fp16_accumulation = before
    for got in (plain, switched):
        error = error_in_ulp(got, b, a)
        print(f"{dtype} {shape}: {error:.2f} ulp")
        assert got.dtype == torch.float32
        assert error < 16
    total = torch.ones(shape[0], shape[2], device="cuda")
    pointer = total.data_ptr()
    assert products.add_product(total, b, a, -0.5).data_ptr() == total.data_ptr() == pointer
    assert error_in_ulp((total.double() - 1) / -0.5, b, a) < 16
