"""Schedules, guidance, noising and Euler against the tabulated reference values."""

import json

import pytest
import torch
from ltx2_engine.ltx2_core import presets
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.state import LatentState, audio_positions, video_positions
from ltx2_engine.ltx2_core.sampling.denoise import Denoiser
from ltx2_engine.ltx2_core.sampling.euler import sample_euler
from ltx2_engine.ltx2_core.sampling.guidance import GuidancePass, StreamGuidance, combine, plan_passes
from ltx2_engine.ltx2_core.sampling.noise import TokenNoise, noised
from ltx2_engine.ltx2_core.sampling.samplers import SAMPLERS, SamplerChoice
from ltx2_engine.ltx2_core.sampling.sigmas import check_sigmas, ltx2_schedule, schedule
from ltx2_engine.ltx2_core.shapes import ClipShape, frames_for_seconds


@pytest.fixture(scope="module")
def vectors(request):
    return json.loads((request.path.parents[2] / "data" / "sampling_vectors.json").read_text())


def euler(denoise, x, sigmas):
    return sample_euler(denoise, x, sigmas, None, SamplerChoice("euler"), lambda *_: None)


def test_ltx2_schedule(vectors):
    worst_64 = worst_32 = 0.0
    for case in vectors["ltx2_schedule"]:
        settings = {key: case[key] for key in ("max_shift", "base_shift", "stretch", "terminal") if key in case}
        got = ltx2_schedule(case["steps"], tokens=case["tokens"], **settings)
        worst_64 = max(worst_64, *(abs(a - b) for a, b in zip(got, case["sigmas_f64"], strict=True)))
        worst_32 = max(worst_32, *(abs(a - b) for a, b in zip(got, case["sigmas_ref_f32"], strict=True)))
    print(f"schedule: {worst_64:.1e} against float64, {worst_32:.1e} against the float32 reference")
    assert worst_64 <= 1e-12
    assert worst_32 <= 5e-6


def test_distilled_lists(vectors):
    assert list(schedule("distilled", 8)) == vectors["distilled"]["stage_1"]
    assert list(schedule("distilled stage 2", 3)) == vectors["distilled"]["stage_2"]


def test_a_single_step_goes_from_noise_to_clean():
    assert ltx2_schedule(1) == (1.0, 0.0)


@pytest.mark.parametrize("levels", [(1.0,), (1.0, 1.0, 0.0), (0.5, 0.9, 0.0), (1.0, float("nan"), 0.0), (1.5, 0.0)])
def test_schedules_that_do_not_fall_are_refused(levels):
    with pytest.raises(ValueError, match="noise levels"):
        check_sigmas(levels)


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"steps": 5000}, {"max_shift": float("inf")}, {"terminal": 0.0}, {"terminal": 1.5}]
)
def test_impossible_schedule_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"choose|must"):
        ltx2_schedule(**({"steps": 8} | settings))


def test_guidance_combination(vectors):
    for case in vectors["guidance"]:
        if "cond" not in case or not isinstance(case["cond"], list):
            continue
        names = ("cond", "uncond", "perturbed", "isolated")
        passes = {name: torch.tensor(case[name], dtype=torch.float64) for name in names}
        settings = {key: case[key] for key in ("cfg", "stg", "modality", "rescale")}
        got = combine(passes, StreamGuidance(**settings, stg_blocks=(1,)))
        assert (got - torch.tensor(case["result"], dtype=torch.float64)).abs().max() <= 1e-12, case["name"]


def test_passes_that_are_planned():
    off = StreamGuidance()
    full = StreamGuidance(cfg=3.0, stg=1.0, modality=3.0, stg_blocks=(28,))
    assert [p.name for p in plan_passes(AV(off, off))] == ["cond"]
    assert [p.name for p in plan_passes(AV(full, full))] == ["cond", "uncond", "perturbed", "isolated"]
    # one modality is enough to ask for a pass, and only its own blocks are skipped
    perturbed = plan_passes(AV(full, off))[2]
    assert (perturbed.skip_video_self_attn_blocks, perturbed.skip_audio_self_attn_blocks) == ((28,), ())
    # a strength without blocks would spend a pass on nothing
    assert len(plan_passes(AV(StreamGuidance(stg=1.0), off))) == 1


def test_euler_step(vectors):
    for case in vectors["euler_step"]:
        x, x0 = (torch.tensor([case[k]], dtype=torch.float64) for k in ("x", "x0"))
        got = euler(lambda *_, x0=x0, **__: AV(x0), AV(x), (case["sigma"], case["sigma_next"]))
        assert abs(float(got.video) - case["result"]) <= 1e-12


def test_euler_trajectory(vectors):
    case = vectors["euler_trajectory"]
    seen = []

    def denoise(x, sigma, **_):
        seen.append(float(x.video))
        return x.map(lambda x: 0.25 + 0.4 * x * (1 - 0.5 * sigma))

    x = AV(torch.tensor([case["x"][0]], dtype=torch.float64))
    end = euler(denoise, x, case["sigmas"])
    assert max(abs(a - b) for a, b in zip([*seen, float(end.video)], case["x"], strict=True)) <= 1e-10


def state(latent, clean, mask, **more):
    latent, clean, mask = (torch.as_tensor(v, dtype=torch.float64).view(1, -1, 1) for v in (latent, clean, mask))
    positions = torch.zeros(1, 1, latent.shape[1], 2)
    return LatentState(latent, clean, mask, positions, latent.shape[1], **more)


def test_noising(vectors):
    for case in vectors["noiser"]:
        noise = torch.full((1, 1, 1), case["noise"], dtype=torch.float64)
        one = state([case["latent"]], [case["clean"]], [case["mask"]])
        got = noised(AV(one), case["noise_scale"], lambda _, noise=noise: AV(noise))
        assert abs(float(got.video) - case["result_core_1_2"]) <= 1e-12


def test_masked_euler(vectors):
    """Kept and half-kept tokens move at their own noise level."""
    for case in vectors["masked_euler"]:
        clean = torch.tensor([[[case["clean"]]]], dtype=torch.float64)
        one = state([0.0], [case["clean"]], [case["mask"]])
        velocity = torch.full((1, 1, 1), case["velocity"], dtype=torch.float64)
        denoiser = Denoiser(
            lambda *_, velocity=velocity: [AV(velocity)], AV(one), (GuidancePass("cond"),), AV(StreamGuidance())
        )
        seen = []

        def recorded(x, sigma, *, step, denoiser=denoiser, seen=seen):
            seen.append(float(x.video))
            return denoiser(x, sigma, step=step)

        start = clean + case["mask"] * (case["noise"] - clean)
        end = euler(recorded, AV(start), case["sigmas"])
        assert max(abs(a - b) for a, b in zip([*seen, float(end.video)], case["x"], strict=True)) <= 1e-10


def test_initial_noise_is_one_draw_a_stream_video_first(vectors):
    want = vectors["rng"]["CPU torch 2.13, seed 10, float32, first 8"]
    video = LatentState(*(torch.zeros(1, 2, 8),) * 2, torch.ones(1, 2, 1), torch.zeros(1, 3, 2, 2), 2)
    audio = LatentState(*(torch.zeros(1, 4, 8),) * 2, torch.ones(1, 4, 1), torch.zeros(1, 1, 4, 2), 4)
    got = noised(AV(video, audio), 1.0, TokenNoise(10, torch.device("cpu")))
    assert torch.allclose(got.video.flatten()[:8], torch.tensor(want), atol=1e-6)
    source = torch.Generator().manual_seed(10)
    assert torch.equal(got.video, torch.randn(1, 2, 8, generator=source))
    assert torch.equal(got.audio, torch.randn(1, 4, 8, generator=source))


def test_video_positions(vectors):
    case = vectors["video_positions"]
    got = video_positions(tuple(case["latent_shape_FHW"]), case["fps"])
    assert torch.allclose(got[0], torch.tensor(case["positions_3_T_2"]), rtol=1e-6, atol=0)


def test_audio_positions(vectors):
    case = vectors["audio_positions"]
    assert torch.allclose(audio_positions(case["frames"])[0, 0], torch.tensor(case["positions_T_2"]), rtol=1e-6, atol=0)


def test_audio_latent_counts(vectors):
    for case in vectors["audio_latent_frames"]:
        assert ClipShape(case["num_frames"], 64, 64, case["fps"]).audio_latents == case["audio_latents"]


def test_seconds_to_frames(vectors):
    for case in vectors["seconds_to_frames"]:
        low, high = (round(case[key] * case["fps"]) for key in ("min_s", "max_s"))
        seconds = min(case["seconds"], case["max_s"])
        assert frames_for_seconds(seconds, case["fps"], low, high) == case["frames"]


def test_names_that_nodes_offer_are_the_ones_there_are():
    assert tuple(SAMPLERS) == presets.SAMPLERS
    for name in presets.SCHEDULES:
        assert schedule(name, 8)[-1] == 0.0


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_euler_is_bit_equal_to_ltx_core(ltx_core, dtype):
    from ltx_core.components.diffusion_steps import EulerDiffusionStep
    from ltx_core.components.schedulers import LTX2Scheduler

    sigmas = LTX2Scheduler().execute(8)
    torch.manual_seed(0)
    x, predictions = torch.randn(1, 60, 16).to(dtype), torch.randn(8, 1, 60, 16).to(dtype)
    want, calls = x, iter(predictions)
    for index, x0 in enumerate(predictions):
        want = EulerDiffusionStep().step(want, x0, sigmas, index)
    got = euler(lambda *_, **__: AV(next(calls)), AV(x), sigmas.tolist())
    assert torch.equal(got.video, want)
    assert max(abs(a - b) for a, b in zip(ltx2_schedule(8), sigmas.tolist(), strict=True)) <= 5e-6


@pytest.mark.reference
def test_guidance_equals_ltx_core(ltx_core):
    from ltx_core.components.guiders import MultiModalGuider, MultiModalGuiderParams

    torch.manual_seed(0)
    passes = dict(zip(("cond", "uncond", "perturbed", "isolated"), torch.randn(4, 1, 50, 16), strict=True))
    theirs = MultiModalGuider(
        params=MultiModalGuiderParams(
            cfg_scale=3.0, stg_scale=1.0, stg_blocks=[1], rescale_scale=0.7, modality_scale=3.0
        ),
        negative_context=None,
    ).calculate(*passes.values())
    ours = combine(passes, StreamGuidance(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(1,)))
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
