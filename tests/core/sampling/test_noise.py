"""Seeds, streams, layouts and normalisation of noise."""

import json
from dataclasses import replace

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.state import audio_state, unpatchify_audio, unpatchify_video, video_state
from ltx2_engine.ltx2_core.sampling.choice import SamplerChoice
from ltx2_engine.ltx2_core.sampling.noise import SamplerNoise, generator, noise_source, noised, normalised
from ltx2_engine.ltx2_core.shapes import ClipShape

CPU = torch.device("cpu")
CLIP = ClipShape(9, 64, 96, 24.0)


@pytest.fixture(scope="module")
def vectors(request):
    return json.loads((request.path.parents[2] / "data" / "sampling_vectors.json").read_text())


def states(batch=1, dtype=torch.float32):
    return AV(
        video_state(torch.zeros(batch, 16, *CLIP.grid, dtype=dtype), CLIP),
        audio_state(torch.zeros(batch, 8, 9, 2, dtype=dtype)),
    )


def source(layout="ltx", seed=10):
    return noise_source(layout, seed, CPU, audio_channels=8)


def with_keyframe(pair):
    tokens = torch.full((pair.video.latent.shape[0], 6, 16), 0.3, dtype=pair.video.latent.dtype)
    return AV(pair.video.append(tokens, torch.zeros(1, 3, 6, 2), 1.0), pair.audio)


def zeros(dtype=torch.float64, tokens=16):
    return AV(torch.zeros(1, tokens, 16, dtype=dtype), torch.zeros(1, tokens, 16, dtype=dtype))


def test_normalisation_table(vectors):
    case = vectors["noise_normalisation"]
    got = normalised(torch.tensor(case["raw_BTC"], dtype=torch.float64))
    assert (got - torch.tensor(case["then_dims_-2_-1"], dtype=torch.float64)).abs().max() <= 1e-12


def test_normalised_noise_has_mean_0_and_deviation_1_in_every_batch_item():
    x = AV(torch.zeros(2, 50, 16, dtype=torch.bfloat16))
    noise = SamplerNoise(SamplerChoice("res_2s"), 1, CPU).step(x).video
    assert noise.dtype == torch.float64
    assert noise.mean((1, 2)).abs().max() <= 1e-14
    assert (noise.std((1, 2)) - 1).abs().max() <= 1e-14


def test_reference_streams_on_cpu(vectors):
    """res_2s: seed -1 for steps and 9999 for midpoints, whatever the noise seed is."""
    choice = SamplerChoice("res_2s", noise_kind="plain")
    noise = SamplerNoise(choice, 123, CPU)
    for name, draw in (("-1", noise.step), ("9999", noise.substep)):
        want = torch.tensor(vectors["rng"][f"CPU torch 2.13, seed {name}, float64, first 4"], dtype=torch.float64)
        got = draw(zeros()).video.flatten()[:4]
        assert (got - want).abs().max() <= 1e-15
    assert generator(-1, CPU).initial_seed() == vectors["rng"]["seed -1 initial_seed"]


def test_initial_noise_on_cpu(vectors):
    want = torch.tensor(vectors["rng"]["CPU torch 2.13, seed 10, float32, first 8"])
    got = source()(states()).video.flatten()[:8]
    assert torch.allclose(got, want, atol=1e-6, rtol=0)


def test_a_stream_goes_on_video_first_and_skips_what_is_absent():
    noise = SamplerNoise(SamplerChoice("euler_ancestral", sde_seed=3), 0, CPU)
    one = torch.Generator().manual_seed(3)
    for _ in range(2):
        got = noise.step(zeros())
        for part in got.present():
            assert torch.equal(part, torch.randn(1, 16, 16, generator=one, dtype=torch.float64))
    assert torch.equal(
        noise.step(AV(None, zeros().audio)).audio, torch.randn(1, 16, 16, generator=one, dtype=torch.float64)
    )


def test_seeds_that_follow_the_noise_seed():
    for name in ("euler_ancestral", "res_2s"):
        noise = SamplerNoise(SamplerChoice(name, sde_seed="follow", noise_kind="plain"), 42, CPU)
        for seed, draw in ((10042, noise.step), (20042, noise.substep)):
            want = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert torch.equal(draw(zeros()).video, want)
    fixed = SamplerChoice("res_2s")
    assert torch.equal(SamplerNoise(fixed, 1, CPU).step(zeros()).video, SamplerNoise(fixed, 2, CPU).step(zeros()).video)


def test_plain_noise_is_drawn_in_the_state_dtype():
    noise = SamplerNoise(SamplerChoice("euler_ancestral"), 0, CPU).step(zeros(torch.bfloat16)).video
    assert noise.dtype == torch.bfloat16


def test_ltx_layout_is_one_token_draw_a_stream():
    """Conditioning tokens take part and so move the noise of what is drawn later."""
    pair = with_keyframe(states(2, torch.bfloat16))
    got, one = source()(pair), torch.Generator().manual_seed(10)
    for part, state in zip(got.present(), pair.present(), strict=True):
        assert torch.equal(part, torch.randn(state.latent.shape, generator=one, dtype=torch.bfloat16))
    assert not torch.equal(got.audio, source()(states(2, torch.bfloat16)).audio)


def test_comfy_layout_is_the_noise_that_comfyui_draws():
    torch.manual_seed(10)
    video, audio = torch.randn(2, 16, *CLIP.grid), torch.randn(2, 8, 9, 2)
    draw = source("comfy")
    for got in (draw(states(2, torch.bfloat16)), source("comfy")(with_keyframe(states(2)))):
        assert torch.equal(unpatchify_video(got.video[:, : video[0, 0].numel()], CLIP.grid), video)
        assert torch.equal(unpatchify_audio(got.audio, 8), audio)
    # appended tokens, and whatever is drawn later, continue the stream
    assert torch.equal(got.video[:, video[0, 0].numel() :], torch.randn(2, 6, 16))
    torch.manual_seed(10)
    torch.randn(2, 16, *CLIP.grid), torch.randn(2, 8, 9, 2)
    assert torch.equal(unpatchify_video(draw(states(2)).video, CLIP.grid), torch.randn(2, 16, *CLIP.grid))


def test_comfy_layout_without_video():
    torch.manual_seed(10)
    got = source("comfy")(AV(None, states().audio))
    assert got.video is None
    assert torch.equal(unpatchify_audio(got.audio, 8), torch.randn(1, 8, 9, 2))


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"'tiles'.*ltx, comfy"):
        source("tiles")


@pytest.mark.parametrize("layout", ["ltx", "comfy"])
def test_frozen_streams_stay_but_take_their_draw(layout):
    free = states()
    latent = torch.full_like(free.video.latent, 0.4)
    frozen = AV(replace(free.video, latent=latent, clean=latent, frozen=True), free.audio)
    got, want = noised(frozen, 1.0, source(layout)), noised(free, 1.0, source(layout))
    assert torch.equal(got.video, latent)
    assert torch.equal(got.audio, want.audio)
    assert not torch.equal(want.video, latent)


@pytest.mark.parametrize("layout", ["ltx", "comfy"])
@pytest.mark.parametrize("scale", [1.0, 0.909375])
def test_noised_states_keep_dtype_and_kept_tokens(layout, scale):
    pair = with_keyframe(states(2, torch.bfloat16))
    got = noised(pair, scale, source(layout))
    kept = got.video[:, pair.video.num_target :]
    assert got.video.dtype == torch.bfloat16
    assert torch.equal(kept, pair.video.clean[:, pair.video.num_target :])
    assert abs(float(got.video[:, : pair.video.num_target].float().std()) - scale) <= 0.2
