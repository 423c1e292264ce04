"""Eight-bit rows against their definition."""

import pytest
import torch
from ltx2_engine.kernels import gelu_quantize, quantize_rows

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("operation", [quantize_rows, gelu_quantize], ids=lambda operation: operation.name)
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 100), (1, 3, 1024)], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rows(agree, randn, operation, shape, dtype):
    got = agree(operation, randn(*shape, dtype=dtype) * 3)
    assert got.data.dtype == torch.float8_e4m3fn
    assert got.scale.shape == (*shape[:-1], 1)


def test_every_number_and_tie_of_the_grid(agree, device):
    """A peak of 448 makes the scale 1: all bfloat16 numbers up to there, which hold every tie between neighbours."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.abs() <= 448]
    row = torch.cat((every, every.new_full((32768 - 1 - len(every) % 32767,), 448.0)))[None]
    row = torch.cat((row, row.new_full((1, -row.shape[1] % 32768), 448.0)), 1).view(-1, 32768).clone()
    row[:, 0] = 448
    got = agree(quantize_rows, row.to(device))
    assert (got.scale == 1).all()


def test_special_rows(agree, randn):
    x = randn(6, 64)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 4] = float("inf")
    x[3] *= 1e30
    x[4] *= 1e-20
    got = agree(quantize_rows, x)
    assert (got.data[0].float() == 0).all()
    assert got.data[1].float().isnan().all()


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_given_scale(agree, randn, shape):
    x, scale = randn(4, 64) * 10, torch.full(shape, 0.037)
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    got = agree(quantize_rows, x, scale.to(x.device))
    assert got.scale.shape == shape
    assert int(got.data.float().isnan().sum()) == 1


def test_rows_are_near_what_they_stand_for(randn, device):
    x = randn(4, 64)
    got = quantize_rows(x)
    assert torch.allclose(got.data.float() * got.scale, x.float(), rtol=2**-4, atol=1e-4)


def test_operator(randn, device):
    from ltx2_engine.kernels.quantize_triton import launch

    torch.library.opcheck(
        launch.registered,
        (randn(3, 64), None, True),
        # the comparison of values does not know eight-bit floats
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operation", [quantize_rows, gelu_quantize], ids=lambda operation: operation.name)
@pytest.mark.parametrize("width", [4096, 16384])
def test_full_size(agree, operation, width):
    agree(operation, torch.randn(1, 15360, width, device="cuda", dtype=torch.bfloat16))
