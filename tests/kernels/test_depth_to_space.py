"""Unfolding of channels against its definition."""

import pytest
import torch
from ltx2_engine.kernels import depth_to_space

STRIDES = [(2, 2, 2), (1, 2, 2), (2, 1, 1), (1, 1, 1)]


@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "skip_channels"),
    [(torch.bfloat16, 0), (torch.bfloat16, 2), (torch.float16, 1), (torch.float32, 4)],
    ids=str,
)
def test_unfolding(agree, randn, dtype, skip_channels, stride):
    folds = stride[0] * stride[1] * stride[2]
    x = randn(2, 4 * folds, 1, 2, 3, dtype=dtype)
    skip = randn(2, skip_channels * folds, 1, 2, 3, dtype=dtype) if skip_channels else None
    want = depth_to_space.definition(x.clone(), stride, skip)
    got = depth_to_space.twin(x, stride, skip)
    assert got.is_contiguous()
    assert torch.equal(got, want)


def test_strided_inputs(agree, randn):
    x = randn(1, 16, 3, 3, 9)
    agree(depth_to_space, x[:, :, 1:, :2, 2:7], (2, 2, 2), x[:, 8:, 1:, 1:, 4:])


def test_operator_and_compilation(randn, device, traced):
    from ltx2_engine.kernels.depth_to_space_triton import launch

    x, skip = randn(1, 16, 2, 2, 3), randn(1, 8, 2, 2, 3)
    torch.library.opcheck(launch.registered, (x, [2, 2, 2], skip))
    want = depth_to_space(x, (2, 2, 2), skip)
    got, operators = traced(lambda x, skip: depth_to_space(x, (2, 2, 2), skip), x, skip)
    assert operators == {"ltx2_engine.depth_to_space.default"}
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_full_size(agree):
    x, skip = (torch.randn(1, n, 8, 48, 80, device="cuda", dtype=torch.bfloat16) for n in (4096, 1024))
    agree(depth_to_space, x, (2, 2, 2), skip)
