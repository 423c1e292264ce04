"""Captured evaluations against the same without graphs: bits, memory, a Stop."""

import gc
import time

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning import state as tokens
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.config.transformer import TransformerConfig
from ltx2_engine.ltx2_core.evaluate import batched_evaluate, split_evaluate
from ltx2_engine.ltx2_core.loading.arena import Arena
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.sampling_memory import sampling_work_bytes
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.transformer.compiled import compiled
from ltx2_engine.ltx2_core.transformer.model import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GPU = torch.device("cuda:0")
CLIP = ClipShape(49, 256, 384, 24.0)
GUIDED = StreamGuidance(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(1,))
BOTH = AV(True, True)


@pytest.fixture(scope="module")
def model():
    """Five blocks of full width."""
    config = released_config("2.3")
    config["transformer"]["num_layers"] = 5
    with torch.device("meta"):
        model = Transformer(TransformerConfig.from_config(config)).requires_grad_(False).to(torch.bfloat16)
    model = model.to_empty(device=GPU)
    generator = torch.Generator(GPU).manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(float(name.endswith("norm.weight")), 0.02, generator=generator)
    for block in model.blocks:
        Arena.of(block, GPU, pin=False)
    return model


def states(kept=False):
    generator = torch.Generator(GPU).manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=GPU, dtype=torch.bfloat16)

    video = tokens.video_state(draw(1, 128, *CLIP.grid), CLIP)
    if kept:
        video = video.write(draw(1, 6, 128), 0, 0.75)
    return AV(video, tokens.audio_state(draw(1, 8, CLIP.audio_latents, 16)))


def evaluation(model, guidance, mode, graphed, check=lambda: None, kept=False):
    given = states(kept)
    prompt = model.config.streams.map(
        lambda own: torch.sin(torch.arange(64 * own.context_dim, device=GPU).view(1, 64, -1)).bfloat16()
    )
    passes = plan_passes(AV(guidance, guidance))
    both = prompt, prompt.map(torch.neg)
    evaluate = {"split": split_evaluate, "batched": batched_evaluate}[mode]
    return evaluate(model, given, passes, *both, check, graphed=graphed), given.map(lambda one: one.latent)


def bits(velocities):
    return [part.clone() for velocity in velocities for part in velocity.present()]


@pytest.mark.parametrize(
    ("guidance", "mode", "kept"),
    [(StreamGuidance(), "split", False), (GUIDED, "split", True), (GUIDED, "batched", False)],
    ids=["one pass", "split", "batched"],
)
def test_graphs_give_the_same_bits(model, guidance, mode, kept):
    with torch.no_grad():
        plain, x = evaluation(model, guidance, mode, False, kept=kept)
        graphed, _ = evaluation(model, guidance, mode, True, kept=kept)
        calls = [(1.0, BOTH), (0.7, BOTH), (0.7, AV(True, False)), (0.4, BOTH), (0.3, AV(True, False)), (0.2, BOTH)]
        for sigma, enabled in calls:
            noisy = x.map(lambda part, sigma=sigma: part * (1 + sigma))
            want, got = bits(plain(noisy, sigma, enabled)), bits(graphed(noisy, sigma, enabled))
            assert all(map(torch.equal, got, want)), (sigma, enabled)
        assert [one.count > 1 for one in graphed._captured.values()] == [True, True]


def test_graphs_take_the_memory_of_the_evaluation_and_give_it_back(model):
    def reserved():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        with torch.no_grad():
            run, x = evaluation(model, GUIDED, "split", True)
            for sigma in (1.0, 0.7, 0.4):
                run(x, sigma, BOTH)
            took = torch.cuda.memory_reserved() - before[0]
        del run, x
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        after = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        assert after[1] == before[1]
        assert after[0] <= before[0] + (2 << 20)
        return took

    reserved()
    tokens = AV(CLIP.num_video_tokens, CLIP.audio_latents)
    options = {"batch": 1, "passes": 4, "mode": "split", "dtype": torch.bfloat16, "fused": True}
    predicted = sampling_work_bytes(model.config, tokens, 64, **options).reserved
    graphed = reserved()
    print(f"reserved: {graphed / 1e6:.0f} MB, {predicted / 1e6:.0f} MB without graphs")
    # PyTorch takes pieces of 20 MB, for either lane
    assert graphed <= predicted + (96 << 20)


def test_memory_of_a_run_goes_back_to_the_device_with_it(model):
    """Not only to PyTorch: other programs and other libraries take memory there too."""

    def left():
        with torch.no_grad():
            run, x = evaluation(model, GUIDED, "split", True)
            for sigma in (1.0, 0.7, 0.4):
                run(x, sigma, BOTH)
        assert next(iter(run._captured.values())).count > 1
        del run, x
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()

    gc.disable()
    try:
        counts = [left() for _ in range(6)]
    finally:
        gc.enable()
    print(f"reserved behind each run: {[count >> 20 for count in counts]} MiB")
    assert max(counts[2:]) <= counts[1]


def test_what_cannot_be_captured_runs_without_graphs(model, monkeypatch, caplog):
    with torch.no_grad():
        plain, x = evaluation(model, StreamGuidance(), "split", False)
        want = bits(plain(x, 0.7, BOTH))
        graphed, _ = evaluation(model, StreamGuidance(), "split", True)
        real = Transformer.run_passes

        def waits(self, *arguments, **named):
            given = real(self, *arguments, **named)
            float(given[0].video.sum())
            return given

        monkeypatch.setattr(Transformer, "run_passes", waits)
        for _ in range(3):
            assert all(map(torch.equal, bits(graphed(x, 0.7, BOTH)), want))
    assert "cannot be captured" in caplog.text
    # the device goes on as if nothing had been
    assert torch.ones(3, device=GPU).sum().item() == 3


def test_a_stop_between_graphs_is_quick_and_the_next_run_works(model):
    stop = []

    def check():
        if stop and time.perf_counter() > stop[0]:
            raise KeyboardInterrupt

    with torch.no_grad():
        graphed, x = evaluation(model, GUIDED, "split", True, check)
        want = bits(graphed(x, 0.7, BOTH))
        stop.append(time.perf_counter() + 0.05)

        def run():
            for _ in range(1000):
                graphed(x, 0.7, BOTH)

        with pytest.raises(KeyboardInterrupt):
            run()
        torch.cuda.synchronize()
        assert time.perf_counter() - stop[0] < 1
        stop.clear()
        assert all(map(torch.equal, bits(graphed(x, 0.7, BOTH)), want))


def test_a_stop_while_capturing_leaves_nothing_behind(model):
    calls = []

    def check():
        calls.append(None)
        if len(calls) == 9:
            raise KeyboardInterrupt

    with torch.no_grad():
        graphed, x = evaluation(model, StreamGuidance(), "split", True, check)
        with pytest.raises(KeyboardInterrupt):
            graphed(x, 0.7, BOTH)
        got = bits(graphed(x, 0.7, BOTH))
        got = bits(graphed(x, 0.7, BOTH))
        plain, _ = evaluation(model, StreamGuidance(), "split", False)
        assert all(map(torch.equal, got, bits(plain(x, 0.7, BOTH))))


def test_compiled_blocks_are_captured_too(model):
    with torch.no_grad():
        plain, x = evaluation(model, StreamGuidance(), "split", False)
        want = bits(plain(x, 0.7, BOTH))
        with compiled(model.blocks):
            graphed, _ = evaluation(model, StreamGuidance(), "split", True)
            for _ in range(2):
                got = bits(graphed(x, 0.7, BOTH))
                for a, b in zip(got, want, strict=True):
                    assert float((a - b).norm() / b.norm()) < 0.01
        assert all(one is not None for one in graphed._captured.values())
