"""bench_step.py on a tiny model: its rows, and that it has no figures for wrong results."""

import contextlib

import pytest
import torch
from ltx2_engine.ltx2_core.transformer.block import AVBlock
from ltx2_engine.ltx2_core.transformer.model import Transformer
from ltx2_engine.ltx2_core.transformer.stream import Stream


@pytest.fixture
def bench(module, monkeypatch):
    bench = module("bench_step")
    monkeypatch.setattr(bench, "TINY", (bench.Shape(32, 64, 9), bench.Shape(32, 64, 17)))
    monkeypatch.setattr(module("own_model"), "TEXT_TOKENS", 16)
    return bench


@pytest.fixture
def only_fused(module, monkeypatch):
    """A function that puts an error into what a method returns, except where plain torch is asked for."""
    plain = []

    @contextlib.contextmanager
    def plain_torch():
        plain.append(True)
        yield
        plain.pop()

    monkeypatch.setattr(module("own_model"), "plain_torch", plain_torch)

    def spoil(owner, name, error):
        right = getattr(owner, name)

        def wrong(self, *args, **kwargs):
            out = right(self, *args, **kwargs)
            return out if plain else error(out)

        monkeypatch.setattr(owner, name, wrong)

    return spoil


def off(x, share):
    return x + share * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


def test_ours_is_measured_before_and_after_each_peer(bench, values):
    peers = [peer for peer, package in bench.PACKAGES.items() if bench.step_peers.installed(package)]
    found = values(bench.main(["--tiny"]))
    assert found["32x64x9: check: exact: worst block's cosine to plain torch"] >= 0.99999
    assert found["32x64x9: check: exact: error / plain torch's error, video"] <= 1.02
    for shape in ("32x64x9", "32x64x17"):
        assert found[f"{shape}: ours exact: time"] > 0
        visits = [name for name in found if name.startswith(f"{shape}: ours exact: time, visit")]
        assert len(visits) == (len(peers) + 1 if peers else 0)
        for who in [f"{peer} eager" for peer in peers] + ["diffusers compiled"] * ("diffusers" in peers):
            ratio = found[f"{shape}: ours exact: time"] / found[f"{shape}: {who}: time"]
            assert found[f"{shape}: ours exact / {who}"] == pytest.approx(ratio)
        fp8 = found[f"{shape}: ours fp8: time"] / found[f"{shape}: ours exact: time"]
        assert found[f"{shape}: ours fp8 / ours exact"] == pytest.approx(fp8)


def test_what_eight_bits_cost_and_how_long_a_stop_takes(bench, values):
    found = values(bench.main(["--tiny", "--guided", "--quality"]))
    for stream in ("video", "sound"):
        of_fp8 = found[f"32x64x9: fp8: error of a forward, {stream}"]
        assert 1e-4 < of_fp8 < 0.1
        assert 20 < found[f"32x64x9: fp8: PSNR after 8 steps, {stream}"] < 100
        assert found[f"32x64x9: fp8: standard deviation after 8 steps, {stream}"] > 0.1
    assert 0 <= found["32x64x17: ours exact, 4 passes: stop, control is back"] < 5


def test_a_wrong_block_has_no_figures(bench, only_fused):
    only_fused(AVBlock, "forward", lambda out: out.map(lambda x: off(x, 0.02)))
    with pytest.raises(SystemExit, match="exact computes something else than plain torch: no figures"):
        bench.main(["--tiny", "--peers"])


def test_a_larger_error_than_that_of_plain_torch_has_no_figures(bench, only_fused):
    only_fused(Stream, "predict", lambda out: off(out, 0.004))
    with pytest.raises(SystemExit, match="error / plain torch's error") as refusal:
        bench.main(["--tiny", "--check"])
    assert "cosine to plain torch: 1 " in str(refusal.value)


def test_numbers_that_are_not_finite_have_no_figures(bench, only_fused):
    only_fused(AVBlock, "forward", lambda out: out.map(lambda x: x * float("nan")))
    with pytest.raises(SystemExit, match="exact: the output is not finite: no figures"):
        bench.main(["--tiny", "--check"])


def test_weights_are_the_same_after_the_comparison_with_float32(bench, module):
    own_model, setting = module("own_model"), bench.tiny()
    model = own_model.random_transformer(setting.model, setting.device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        reference = bench.Reference(setting.model, model, setting.check.clip, setting.device)
    assert all(part.dtype == torch.float32 for part in reference.wide)
    assert len(reference.calls) == len(model.blocks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_guided_steps_are_measured_against_one_forward(bench, values):
    found = values(bench.main(["--tiny", "--guided"]))
    assert found["32x64x9: ours exact, guided, 4 passes, split / one forward"] > 0
    for kind in ("split", "batched"):
        assert found[f"32x64x17: ours exact, HQ stage 1, 3 passes, {kind} / one forward"] > 0


def test_a_guided_step_whose_first_pass_is_not_the_plain_forward_has_no_figures(bench, monkeypatch):
    right = Transformer.run_passes

    def wrong(self, passes, **options):
        return right(self, passes, **options)[:: -1 if len(passes) > 1 else 1]

    monkeypatch.setattr(Transformer, "run_passes", wrong)
    with pytest.raises(SystemExit, match="its first pass is not the plain forward"):
        bench.main(["--tiny", "--guided"])


def test_a_peer_that_is_slower_than_known_is_warned_of(bench, monkeypatch):
    monkeypatch.setattr(bench, "hardware", lambda: "1 x NVIDIA H200, 140 GiB")
    assert not list(bench.warnings(bench.MIDDLE, bench.COMPILED, 1.04 * 1048))
    (row,) = bench.warnings(bench.MIDDLE, bench.COMPILED, 1.1 * 1048)
    assert row.id.startswith("WARNING 768x1280x121: diffusers compiled is slower")
    assert row.value == pytest.approx(1.1)
    assert not list(bench.warnings(bench.STAGE_1, bench.COMPILED, 1e6))
    monkeypatch.setattr(bench, "hardware", lambda: "1 x another GPU")
    assert not list(bench.warnings(bench.MIDDLE, bench.COMPILED, 1.1 * 1048))


def test_operations_of_a_forward_are_those_of_the_table(module):
    shapes = module("shapes")
    found = {str(shape): (shape.video_tokens, round(shape.tflop, 1)) for shape in shapes.SHAPES}
    assert found == {
        "512x768x121": (6144, 198.9),
        "544x960x121": (8160, 275.4),
        "768x1280x121": (15360, 601.0),
        "1088x1920x121": (32640, 1714.9),
    }


def test_a_profile_tells_how_busy_the_device_is(module):
    profile = module("step_profile")
    assert profile.covered([(4, 6), (0, 2), (1, 3), (1, 2)]) == (5, 6)
    text, times = profile.profiled(lambda: torch.ones(64, 64) @ torch.ones(64, 64), torch.device("cpu"))
    assert len(times["aten::mm"]) == profile.STEPS
    assert "aten::mm" in text
    assert "device busy" in text
