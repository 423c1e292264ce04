"""Rotary tables against golden values of the reference, and the timestep sinusoid."""

import pytest
import torch
from ltx2_engine.kernels import apply_split_rotary
from ltx2_engine.ltx2_core.conditioning.state import audio_positions, video_positions
from ltx2_engine.ltx2_core.transformer.adaln import sinusoid
from ltx2_engine.ltx2_core.transformer.rope import rotary_table

SHARED = {"heads": 32, "theta": 10000.0, "double_precision": True, "dtype": torch.float32}


def last_token(positions, dim, max_pos):
    table = rotary_table(positions[:, :, -1:], dim=dim, max_pos=max_pos, **SHARED)
    return table.cos[0, :, 0], table.sin[0, :, 0]


def test_video_table_at_768x1280():
    """Last token of 121 frames at 24 fps: 4.875 s, 752 px, 1264 px."""
    cos, sin = last_token(video_positions((16, 24, 40), 24.0), 4096, (20, 2048, 2048))
    assert cos.shape == (32, 64)
    want_cos = [1, 1, 0.69308734, 0.91420972, 0.93299282, 0.68514401]
    want_sin = [0, 0, -0.72085363, -0.40524134, 0.35989505, -0.72840762]
    assert torch.allclose(cos[0, :6], torch.tensor(want_cos), atol=2e-7)
    assert torch.allclose(sin[0, :6], torch.tensor(want_sin), atol=2e-7)
    # the highest frequencies, where a float32 power would be off by up to 4e-3
    assert torch.allclose(cos[31, -3:], torch.tensor([0.00060842, 0.92388284, 0.92381066]), atol=1e-6)
    assert torch.allclose(sin[31, -3:], torch.tensor([-0.99999982, -0.38267541, -0.38284972]), atol=1e-6)


def test_audio_table():
    cos, sin = last_token(audio_positions(126), 2048, (20,))
    assert torch.allclose(cos[0, :3], torch.tensor([0.70599508, 0.70093673, 0.69579655]), atol=2e-7)
    assert torch.allclose(sin[0, :3], torch.tensor([-0.70821673, -0.71322346, -0.71823895]), atol=2e-7)


def test_float32_frequencies_differ():
    positions = video_positions((16, 24, 40), 24.0)
    tables = [
        rotary_table(positions, dim=4096, max_pos=(20, 2048, 2048), **SHARED | {"double_precision": double})
        for double in (True, False)
    ]
    assert 1e-4 < float((tables[0].cos - tables[1].cos).abs().max()) < 1e-2


def test_sinusoid_at_700():
    e = sinusoid(torch.tensor(700.0))
    assert torch.allclose(e[:3], torch.tensor([-0.83910429, -0.46180043, -0.98841041]), atol=1e-6)
    assert torch.allclose(e[128:131], torch.tensor([0.54397053, -0.88698387, 0.15180516]), atol=1e-6)
    assert torch.allclose(e[[127, 255]], torch.tensor([0.99717212, 0.07515161]), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_rounds_the_cosine_product_first(dtype):
    """y1 = round(fp32(round(x1 c)) - fp32(x2) fp32(s)), computed step by step in float64 and rounded where stated."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=generator).to(dtype)
    angle = torch.randn(1, 3, 5, 4, generator=generator)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    first, second = x.chunk(2, -1)
    want = torch.cat(
        (
            ((first * cos).double() - second.double() * sin.double()).to(dtype),
            ((second * cos).double() + first.double() * sin.double()).to(dtype),
        ),
        -1,
    )
    got = apply_split_rotary(x, cos, sin)
    if dtype == torch.bfloat16:
        assert torch.equal(got, want)
    else:
        assert torch.allclose(got, want, atol=1e-6)
