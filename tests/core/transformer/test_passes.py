"""Split passes: equal to batched ones, block-major with shared prefixes bit for bit, and counted."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning import state as tokens
from ltx2_engine.ltx2_core.config.transformer import TransformerConfig
from ltx2_engine.ltx2_core.evaluate import batched_evaluate, split_evaluate
from ltx2_engine.ltx2_core.presets import GUIDANCE_PRESETS
from ltx2_engine.ltx2_core.sampling.denoise import Denoiser
from ltx2_engine.ltx2_core.sampling.guidance import GuidancePass, StreamGuidance, evaluation_mode, plan_passes
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.testing import assert_close
from ltx2_engine.ltx2_core.tiny import tiny_config
from ltx2_engine.ltx2_core.transformer.attention import Attention
from ltx2_engine.ltx2_core.transformer.compiled import compiled
from ltx2_engine.ltx2_core.transformer.model import Transformer
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

CLIP = ClipShape(17, 64, 96, 24.0)
PERTURBED = GuidancePass("perturbed", skip_video_self_attn_blocks=(1,), skip_audio_self_attn_blocks=(1,))
ISOLATED = GuidancePass("isolated", disable_a2v_cross_attn=True, disable_v2a_cross_attn=True)
COND, UNCOND = GuidancePass("cond"), GuidancePass("uncond", negative=True)
ODD = GuidancePass("odd", skip_video_self_attn_blocks=(2,), disable_v2a_cross_attn=True)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def random_model(label, num_layers=3, dtype=torch.float32):
    config = tiny_config(label)
    config["transformer"]["num_layers"] = num_layers
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.from_config(config)).to(dtype)
    for name, parameter in model.named_parameters():
        near_one = name.endswith(("q_norm.weight", "k_norm.weight"))
        scale = 0.15 if num_layers < 10 else 0.05
        parameter.data = (torch.randn(parameter.shape) * scale + near_one).to(dtype)
    return model.requires_grad_(False)


def setting(model, batch=1, keep_first_frame=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    video = tokens.video_state(draw(batch, 16, *CLIP.grid), CLIP)
    audio = tokens.audio_state(draw(batch, 2, CLIP.audio_latents, 16))
    if keep_first_frame:
        video = video.write(draw(batch, 6, 16), 0, 0.7)
    streams = model.config.streams
    widths = (
        (streams.video.context_dim, streams.audio.context_dim)
        if model.config.caption_channels is None
        else (model.config.caption_channels,) * 2
    )
    prompts = [AV(*(draw(1, 7, width) for width in widths)) for _ in range(2)]
    states = AV(video, audio)
    x = states.map(lambda state: draw(*state.latent.shape))
    return states, prompts, x


def evaluate(kind, model, passes, batch=1, dtype=torch.float32, **options):
    states, prompts, x = setting(model, batch, dtype=dtype)
    blocks = []
    run = kind(model, states, passes, *prompts, lambda: blocks.append(1), **options)
    return run(x, 0.7, AV(True, True)), len(blocks)


def subsets():
    passes = (COND, UNCOND, PERTURBED, ISOLATED, ODD)
    return [chosen for count in range(1, 6) for chosen in combinations(passes, count)]


@pytest.mark.parametrize("passes", subsets(), ids=lambda passes: "+".join(p.name for p in passes))
@pytest.mark.parametrize(("label", "batch"), [("2.0", 1), ("2.3", 1), ("2.3", 2)])
def test_split_equals_batched(label, batch, passes):
    model = random_model(label)
    split, _ = evaluate(split_evaluate, model, passes, batch)
    batched, _ = evaluate(batched_evaluate, model, passes, batch)
    for one, a, b in zip(passes, split, batched, strict=True):
        assert_close(f"{one.name} video", a.video, b.video, 1e-5)
        assert_close(f"{one.name} audio", a.audio, b.audio, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("passes", subsets(), ids=lambda passes: "+".join(p.name for p in passes))
def test_sharing_prefixes_changes_no_bit(passes, dtype):
    model = random_model("2.3", dtype=dtype)
    shared, fewer = evaluate(split_evaluate, model, passes, dtype=dtype)
    alone, all_blocks = evaluate(split_evaluate, model, passes, dtype=dtype, share_prefixes=False)
    for a, b in zip(shared, alone, strict=True):
        assert torch.equal(a.video, b.video)
        assert torch.equal(a.audio, b.audio)
    assert all_blocks == 3 * len(passes)
    assert fewer <= all_blocks


@pytest.mark.parametrize(
    ("passes", "first", "second"),
    [
        ((COND,), 1, 1),
        ((COND, UNCOND), 1, 2),
        ((COND, UNCOND, ISOLATED), 1, 3),
        ((COND, UNCOND, PERTURBED, ISOLATED), 1, 4),
        ((COND, ODD), 1, 2),
    ],
    ids=lambda value: "+".join(p.name for p in value) if isinstance(value, tuple) else None,
)
def test_passes_attend_to_themselves_once_until_they_part(monkeypatch, passes, first, second):
    """Also passes of different prompts; the perturbed one skips its own attention in the second block, and counts there."""
    model, calls = random_model("2.3"), []
    attends = Attention.attend_self
    monkeypatch.setattr(
        Attention, "attend_self", lambda self, *args, **how: calls.append(self) or attends(self, *args, **how)
    )
    embedded = []
    for stream in model.streams.present():
        stream.patchify_proj.register_forward_hook(lambda *_: embedded.append(1))
    evaluate(split_evaluate, model, passes)
    for half in (half for number in (0, 1) for half in model.blocks[number].halves.present()):
        assert calls.count(half.attn1) == (first if half in model.blocks[0].halves.present() else second)
    assert len(embedded) == 2


def guidance_of(preset):
    values = GUIDANCE_PRESETS[preset]
    blocks = tuple(int(block) for block in str(values["stg_blocks"]).split(",") if block)
    return AV(
        *(
            StreamGuidance(
                **{name: values[f"{stream}_{name}"] for name in ("cfg", "stg", "modality", "rescale")},
                stg_blocks=blocks,
            )
            for stream in ("video", "audio")
        )
    )


@pytest.mark.parametrize(
    ("preset", "label", "blocks"),
    [
        ("guided 2.0", "2.0", 163),
        ("guided 2.3/2.5", "2.3", 164),
        ("hq", "2.3", 144),
        ("hq", "2.0", 144),
        ("distilled", "2.3", 48),
    ],
)
def test_blocks_that_an_evaluation_runs(preset, label, blocks):
    """Of 48 blocks a perturbed pass runs those from its first perturbed one on."""
    model = random_model(label, num_layers=48)
    passes = plan_passes(guidance_of(preset))
    _, count = evaluate(split_evaluate, model, passes)
    print(f"{preset} {label}: {len(passes)} passes, {count} blocks")
    assert count == blocks


@pytest.mark.parametrize("preset", ["guided 2.0", "guided 2.3/2.5", "hq"])
def test_guided_predictions_agree_after_guidance(preset):
    """Relative RMS of the guided x0, split against batched."""
    model = random_model("2.0" if "2.0" in preset else "2.3", num_layers=3)
    guidance = guidance_of(preset).map(lambda g: replace(g, stg_blocks=(1,) if g.stg_blocks else ()))
    passes = plan_passes(guidance)
    states, prompts, x = setting(model)
    results = [
        Denoiser(kind(model, states, passes, *prompts, lambda: None), states, passes, guidance)(x, 0.7, step=0)
        for kind in (split_evaluate, batched_evaluate)
    ]
    for stream in ("video", "audio"):
        a, b = (getattr(result, stream).double() for result in results)
        error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
        print(f"{preset} {stream}: relative RMS {error:.1e}")
        assert error <= 1e-5


def test_a_skipped_modality_keeps_its_result_and_is_still_read():
    model = random_model("2.3")
    states, prompts, x = setting(model)
    guidance = AV(StreamGuidance(skip_step=1), StreamGuidance())
    passes = plan_passes(guidance)
    calls = []

    def counted(*arguments):
        calls.append(arguments[-1])
        return run(*arguments)

    run = split_evaluate(model, states, passes, *prompts, lambda: None)
    denoise = Denoiser(counted, states, passes, guidance)
    first = denoise(x, 0.9, step=0)
    second = denoise(x.map(lambda t: t * 0.9), 0.7, step=1)
    third = denoise(x.map(lambda t: t * 0.8), 0.5, step=2)
    assert [(on.video, on.audio) for on in calls] == [(True, True), (False, True), (True, True)]
    assert torch.equal(first.video, second.video)
    assert not torch.equal(first.audio, second.audio)
    assert not torch.equal(second.video, third.video)
    midpoint = Denoiser(counted, states, passes, guidance)
    midpoint(x, 0.9, step=1, midpoint=True)
    assert calls[-1].video, "a midpoint is never skipped"


@pytest.mark.parametrize(("skip", "steps"), [(0, []), (1, [1, 3, 5, 7, 9, 11]), (2, [1, 2, 4, 5, 7, 8, 10, 11])])
def test_steps_that_are_skipped(skip, steps):
    assert [step for step in range(12) if StreamGuidance(skip_step=skip).skips(step)] == steps


def test_the_mode_follows_the_choice_and_the_size():
    assert evaluation_mode("split", 4, 10) == "split"
    assert evaluation_mode("batched", 4, 10**6) == "batched"
    assert evaluation_mode("auto", 4, 6144) == "split"
    assert evaluation_mode("auto", 4, 300) == "batched"
    assert evaluation_mode("auto", 1, 300) == "split"
    assert evaluation_mode("auto", 4, 300, batched_fits=False) == "split"
    assert evaluation_mode("batched", 4, 300, batched_fits=False) == "batched", "the user's choice stands"


def test_compiled_blocks_are_one_graph_and_the_same_function():
    """Also behind the context, where nothing is compiled any more."""
    model = random_model("2.3")
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()
    passes = (COND, UNCOND)
    want, _ = evaluate(split_evaluate, model, passes)
    with compiled(model.blocks, backend=counter, options=None):
        got, _ = evaluate(split_evaluate, model, passes)
    again, _ = evaluate(split_evaluate, model, passes)
    assert counter.frame_count >= 1
    assert not counters["graph_break"]
    for one, other, last in zip(want, got, again, strict=True):
        for stream in ("video", "audio"):
            assert_close(stream, getattr(other, stream), getattr(one, stream), 1e-6)
            assert torch.equal(getattr(last, stream), getattr(one, stream))
    torch._dynamo.reset()
