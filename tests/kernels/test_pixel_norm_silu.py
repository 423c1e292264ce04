"""Norm and SiLU of the video VAE against the definition."""

import pytest
import torch
from ltx2_engine.kernels import pixel_norm_silu

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def check(device):
    """Both forms, each into an output of its own full of NaN, of the memory layout of ``like``."""

    def run(x, like, modulation=None, **mode):
        outs = []
        for form in (pixel_norm_silu.twin, pixel_norm_silu.definition):
            out = like(x.new_full((), float("nan")))
            assert form(x, out, modulation, **mode) is out
            outs.append(out)
        wrong = pixel_norm_silu.contract.difference(outs[1], outs[0])
        assert wrong is None, wrong
        return outs[0]

    return run


def plain(shape):
    return lambda nan: nan.repeat(*shape)


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize("modulated", [0, 1, 2], ids=["plain", "one", "each"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_modulation(check, randn, dtype, modulated, fast):
    shape = (2, 24, 2, 3, 5)
    modulation = (randn(modulated, 24, 1, 1, 1, dtype=dtype), randn(modulated, 24, 1, 1, 1, dtype=dtype))
    check(randn(*shape, dtype=dtype), plain(shape), modulation if modulated else None, fast=fast)


@pytest.mark.parametrize("channels", [8, 64, 100])
def test_output_inside_a_padded_buffer(check, randn, channels):
    shape = (2, channels, 3, 4, 11)
    check(randn(*shape), lambda nan: nan.repeat(2, channels, 6, 4, 11)[:, :, 2:5])


@pytest.mark.parametrize("layout", ["channels last", "transposed", "cropped"])
def test_strides(check, randn, layout):
    x = randn(1, 40, 2, 3, 70)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last_3d)
    x = {"transposed": x[..., :7].transpose(3, 4), "cropped": x[..., 1:4, 2:69]}.get(layout, x)
    check(x, plain(x.shape))


def test_special_numbers(check, randn):
    x = randn(1, 16, 1, 1, 6)
    x[..., 0], x[0, 3, 0, 0, 1], x[0, 3, 0, 0, 2] = 0, float("nan"), float("inf")
    x[..., 3] *= 1e18
    x[..., 4] *= 1e-18
    out = check(x, plain(x.shape))
    assert out[..., 1].isnan().all()


def test_roundings_matter(randn, device):
    x = randn(1, 32, 1, 8, 16)
    exact, fast = (pixel_norm_silu.twin(x, torch.empty_like(x), fast=fast) for fast in (False, True))
    assert float((exact != fast).float().mean()) > 0.15


def test_operator_and_compilation(randn, device, traced):
    from ltx2_engine.kernels.pixel_norm_silu_triton import launch

    x, shift = randn(1, 16, 2, 2, 3), randn(1, 16, 1, 1, 1)
    torch.library.opcheck(launch.registered, (x, torch.zeros_like(x), shift, shift, 1e-8, False))

    def call(x):
        out = torch.zeros_like(x)
        pixel_norm_silu(x, out)
        return out

    want = call(x)
    got, operators = traced(call, x)
    assert operators == {"ltx2_engine.pixel_norm_silu.default"}
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(1, 1024, 8, 24, 40), (1, 128, 8, 192, 320)], ids=str)
def test_full_size(check, shape):
    check(torch.randn(*shape, device="cuda", dtype=torch.bfloat16), plain(shape))
