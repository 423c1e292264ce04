"""bench_decode.py on a tiny VAE: its rows, and that it has no figures for wrong results."""

import contextlib

import pytest
from ltx2_engine.ltx2_core.vae.video_decoder import VideoDecoder


@pytest.fixture
def bench(module, monkeypatch):
    bench = module("bench_decode")
    monkeypatch.setattr(bench, "TINY", (None, bench.Shape(32, 64, 17)))
    return bench


def test_ours_and_diffusers_are_measured_in_one_run(bench, values):
    found = values(bench.main(["--tiny"]))
    assert found["32x64x17, float32: streamed to whole, relative difference"] <= 1e-5
    for kind in ("whole", "streamed", "tiled"):
        assert found[f"32x64x17: ours {kind}: time"] > 0
    assert found["sound, 18 latents: time"] > 0
    if bench.installed("diffusers"):
        ratio = found["32x64x17: ours streamed / diffusers whole: time"]
        first = found["32x64x17: ours streamed: time, visit 1"]
        assert ratio == pytest.approx(first / found["32x64x17: diffusers whole: time"])


def test_a_stream_that_differs_from_the_whole_clip_has_no_figures(bench, monkeypatch):
    right = bench.decode
    monkeypatch.setattr(bench, "decode", lambda *args: (0.999 * chunk for chunk in right(*args)))
    with pytest.raises(SystemExit, match=r"float32: streamed to whole, relative difference: 1\.\d+e-03, allowed 1e-05"):
        bench.main(["--tiny", "--no-peers"])


def test_a_picture_that_differs_from_plain_torch_has_no_figures(bench, module, monkeypatch):
    right, plain = VideoDecoder.forward, []

    @contextlib.contextmanager
    def plain_torch():
        plain.append(True)
        yield

    def forward(self, z):
        return right(self, z) + 0.1 * bool(plain)

    monkeypatch.setattr(module("own_model"), "plain_torch", plain_torch)
    monkeypatch.setattr(VideoDecoder, "forward", forward)
    with pytest.raises(SystemExit, match="whole to plain torch, cosine is"):
        bench.main(["--tiny", "--no-peers"])


def test_the_stream_is_planned_for_half_of_the_memory_of_the_whole_clip(bench):
    config = bench.released_config("2.3")
    for shape in (bench.MIDDLE, bench.LARGE):
        setting = bench.Setting(bench.torch.device("cpu"), config, (shape,), shape, None)
        plans = bench.plans(setting, shape)
        assert plans["streamed"].tile is None
        assert plans["tiled"].tile is not None
        assert not plans["tiled"].park
        assert all(plans[kind].work_bytes <= plans["whole"].work_bytes / 2 for kind in ("streamed", "tiled"))
