"""Two stages, LoRAs, fixed sound and single streams through the engine, tiny checkpoints."""

from dataclasses import replace

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.condition_encoders import ModelEncoders
from ltx2_engine.ltx2_core.conditioning.audio import KeepAudio, Sound
from ltx2_engine.ltx2_core.conditioning.image import ImageCondition
from ltx2_engine.ltx2_core.conditioning.kinds import CONDITIONS
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.conditioning.pixels import clip_pixels
from ltx2_engine.ltx2_core.conditioning.retake import retake
from ltx2_engine.ltx2_core.config.fields import ConfigError
from ltx2_engine.ltx2_core.handles import ModelHandle
from ltx2_engine.ltx2_core.job import SampleJob
from ltx2_engine.ltx2_core.loading.write import write_checkpoint
from ltx2_engine.ltx2_core.presets import DISTILLED_STAGE_2_SIGMAS, SAMPLERS
from ltx2_engine.ltx2_core.sampling.choice import SamplerChoice
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.testing import assert_close
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from ltx2_engine.ltx2_core.tiny_upsampler import KINDS, upsampler_file, write_tiny_upsampler

CLIP = ClipShape(17, 64, 96, 24.0)
OFF = AV(StreamGuidance(), StreamGuidance())
HQ = AV(StreamGuidance(cfg=3.0, modality=3.0, rescale=0.45), StreamGuidance(cfg=7.0, modality=3.0, rescale=1.0))


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def upsamplers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upsamplers")
    for kind in KINDS:
        write_tiny_upsampler(folder / upsampler_file(kind), kind)
    return folder


def job(engine, latent=None, guidance=OFF, sigmas=(1.0, 0.6, 0.0), sampler="euler", **more):
    latent = AVLatent(CLIP) if latent is None else latent
    prompts = engine.encode("a bell rings"), engine.encode("blurry")
    return SampleJob(latent, *prompts, guidance, sigmas, SamplerChoice(sampler), 3, **more)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("2.3-spatial-x2", (17, 128, 192, 24.0)),
        ("2.3-spatial-x1.5", (17, 96, 160, 24.0)),
        ("2.3-temporal-x2", (33, 64, 96, 48.0)),
    ],
)
def test_upscaling_changes_the_picture_and_leaves_the_sound(tiny_engine, upsamplers, kind, size):
    engine = tiny_engine("2.3")
    first = engine.sample(job(engine, sigmas=(1.0, 0.0)))
    larger = engine.upscale(first, upsamplers / upsampler_file(kind))
    assert larger.clip == ClipShape(*size)
    assert tuple(larger.latents.video.shape[2:]) == larger.clip.grid
    assert torch.equal(larger.latents.audio, first.latents.audio)
    decoded = engine.decode(larger, "auto")
    assert decoded.frames.shape[:3] == size[:3]


def test_an_upsampler_of_another_version_is_refused(tiny_engine, upsamplers):
    engine = tiny_engine("2.3")
    first = engine.sample(job(engine, sigmas=(1.0, 0.0)))
    with pytest.raises(ConfigError, match=r"is for LTX-2\.0, but the model is LTX-2\.3"):
        engine.upscale(first, upsamplers / upsampler_file("2.0-spatial-x2"))
    with pytest.raises(ValueError, match="connect the sampler's output"):
        engine.upscale(AVLatent(CLIP), upsamplers / upsampler_file("2.3-spatial-x2"))


def test_the_second_stage_refines_the_first(tiny_engine, upsamplers):
    """From 0.909 the start is one tenth of the upscaled latent; the image is kept at the new size."""
    engine = tiny_engine("2.3")
    first = engine.sample(job(engine))
    larger = engine.upscale(first, upsamplers / upsampler_file("2.3-spatial-x2"))
    condition = ImageCondition(torch.rand(70, 110, 3), 1.0, crf=0)
    refined = engine.sample(job(engine, larger.with_condition(condition), sigmas=DISTILLED_STAGE_2_SIGMAS))
    assert refined.clip == larger.clip
    assert not torch.equal(refined.latents.video, larger.latents.video)
    encoders = ModelEncoders(engine)
    kept = encoders.video(condition.pixels(larger.clip, encoders.default_crf))
    assert_close("first frame", refined.latents.video[:, :, :1], kept, 1e-5)
    joined = refined.with_audio_of(first)
    assert torch.equal(joined.latents.audio, first.latents.audio)
    assert torch.equal(joined.latents.video, refined.latents.video)
    with pytest.raises(ValueError, match="of the same length"):
        refined.with_audio_of(replace(first, clip=ClipShape(25, 64, 96, 24.0)))


@pytest.fixture
def style(tiny_engine, tmp_path):
    """A LoRA for the tiny model of 2.3, that asks for reference videos of half the size."""
    path = tmp_path / "style.safetensors"
    checkpoint = tiny_engine("2.3").files.spec.checkpoint
    write_tiny_lora(path, checkpoint, metadata={"reference_downscale_factor": "2"})
    return path


def same(first, second):
    return torch.equal(first.video, second.video) and torch.equal(first.audio, second.audio)


def test_a_lora_makes_another_model_and_leaves_the_first(tiny_engine, style):
    engine = tiny_engine("2.3")
    plain = engine.sample(job(engine)).latents
    handle = ModelHandle(engine.files.spec, engine)
    strong, weak, none = (handle.with_lora(style, strength) for strength in (1.0, 0.25, 0.0))
    clips = [one.engine.sample(job(engine)).latents for one in (strong, weak, none)]
    assert not torch.allclose(clips[0].video, plain.video, atol=1e-2)
    changes = [float((clip.video - plain.video).abs().mean()) for clip in clips]
    assert changes[1] < changes[0]
    assert same(clips[2], plain)
    assert same(engine.sample(job(engine)).latents, plain)
    assert strong.reference_factors() == (2, 1)
    assert handle.reference_factors() == (1, 1)
    assert "style.safetensors 0.25" in str(weak)
    assert "style.safetensors (LoRA, rank 4) at strength 0.25" in weak.lora_report()
    assert handle.lora_report() == "no LoRA"


def test_models_with_loras_share_every_network_and_keep_their_results(tiny_engine, style, tmp_path):
    """One transformer holds whichever LoRAs are used: its weights are switched, in any order, with the same bits."""
    engine = tiny_engine("2.3")
    other = tmp_path / "other.safetensors"
    write_tiny_lora(other, engine.files.spec.checkpoint, targets="all", kind="dora", seed=1)
    plain = ModelHandle(engine.files.spec, engine)
    strong = plain.with_lora(style, 1.0)
    handles = [plain, strong, strong.with_lora(other, 0.5), plain.with_lora(style, 1.0, audio=0.0)]
    for handle in handles:
        assert all(handle.engine._networks[name] is network for name, network in engine._networks.items())
    clips = [handle.engine.sample(job(engine)).latents for handle in handles]
    assert not any(same(a, b) for number, a in enumerate(clips) for b in clips[:number])
    for number in (2, 0, 3, 1, 0, 1, 3, 2):
        assert same(handles[number].engine.sample(job(engine)).latents, clips[number]), number
    engine.close()
    assert same(handles[2].engine.sample(job(engine)).latents, clips[2]), "read anew, with its LoRAs"
    assert same(engine.sample(job(engine)).latents, clips[0])


def test_a_lora_that_does_not_fit_is_refused_and_changes_nothing(tiny_engine, style, tmp_path):
    engine = tiny_engine("2.3")
    plain = engine.sample(job(engine)).latents
    handle = ModelHandle(engine.files.spec, engine)
    with pytest.raises(ValueError, match="from -10 to 10"):
        handle.with_lora(style, float("nan"))
    with pytest.raises(ValueError, match="audio 20"):
        handle.with_lora(style, 2.0, audio=10.0)
    with pytest.raises(ValueError, match=r"tiny\.safetensors"):
        handle.with_lora(engine.files.spec.checkpoint, 1.0)
    wrong = {"A": torch.ones(3, 64), "B": torch.ones(96, 3)}
    layer = "diffusion_model.transformer_blocks.1.attn1.to_q"
    sizes = tmp_path / "sizes.safetensors"
    write_checkpoint(sizes, {f"{layer}.lora_{end}.weight": factor for end, factor in wrong.items()}, {})
    with pytest.raises(ValueError, match=rf"sizes\.safetensors: .*'{layer}' changes a weight \[96, 64\]"):
        handle.with_lora(sizes, 1.0)
    with pytest.raises(ValueError, match=r"its precision is ltx-core, that of style\.safetensors is float32"):
        handle.with_lora(style, 1.0).with_lora(style, 1.0, parity="ltx-core")
    assert same(engine.sample(job(engine)).latents, plain)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("mode", ["split", "batched"])
def test_every_sampler_runs_in_both_modes(tiny_engine, name, mode):
    engine = tiny_engine("2.3")
    one = job(engine, guidance=HQ, sigmas=(1.0, 0.7, 0.4, 0.0), sampler=name, evaluation=mode)
    first, again = (engine.sample(one).latents for _ in range(2))
    assert torch.isfinite(first.video).all()
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.audio, again.audio)


def test_cfg_plus_plus_needs_a_negative_prompt(tiny_engine):
    engine = tiny_engine("2.3")
    with pytest.raises(ValueError, match="euler_cfg_pp needs a negative prompt"):
        engine.sample(replace(job(engine, sampler="euler_cfg_pp"), negative=None))


def test_fresh_noise_is_the_references_unless_it_follows_the_seed(tiny_engine):
    """With res_2s another seed changes the start alone; followed, the fresh noise too."""
    engine = tiny_engine("2.3")
    fixed = job(engine, sampler="res_2s")
    follows = replace(fixed, sampler=SamplerChoice("res_2s", sde_seed="follow"))
    a, b = (engine.sample(one).latents.video for one in (fixed, follows))
    assert not torch.equal(a, b)


def test_the_comfy_layout_starts_from_other_noise(tiny_engine):
    engine = tiny_engine("2.3")
    a, b = (engine.sample(job(engine, noise_layout=layout)).latents.video for layout in ("ltx", "comfy"))
    assert not torch.allclose(a, b, atol=0.1)


def test_a_kept_sound_is_not_touched(tiny_engine):
    engine = tiny_engine("2.3")
    sound = Sound(0.3 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)), 16000)
    latent = AVLatent(CLIP).with_condition(KeepAudio(sound))
    sampled = engine.sample(job(engine, latent, guidance=HQ))
    encoded = ModelEncoders(engine).audio(sound.part(0.0, CLIP.duration_s).waveform[None], 16000)
    assert torch.equal(sampled.latents.audio, encoded[:, :, : CLIP.audio_latents].float())
    heard = KeepAudio(sound).heard(CLIP)
    assert torch.equal(heard.waveform, sound.waveform[:, : round(CLIP.duration_s * 16000)])
    free = engine.sample(job(engine, guidance=HQ))
    assert not torch.allclose(sampled.latents.video, free.latents.video, atol=1e-3), "the picture ignores the sound"


def test_a_retake_keeps_what_is_outside_the_span(tiny_engine):
    engine = tiny_engine("2.3")
    frames = torch.rand(CLIP.frames, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    latent = AVLatent(CLIP).with_condition(*retake(frames, None, 0.0, 0.3))
    sampled = engine.sample(job(engine, latent)).latents.video
    source = ModelEncoders(engine).video(clip_pixels(frames, 64, 96))
    # latent frame 2 holds pixel frames 9 to 16, from 0.375 s on
    assert torch.equal(sampled[:, :, 2], source[:, :, 2].float())
    assert not torch.allclose(sampled[:, :, :2], source[:, :, :2].float(), atol=1e-2)


@pytest.mark.parametrize("evaluation", ["split", "batched"])
def test_sound_alone_and_video_alone(tiny_engine, evaluation):
    engine = tiny_engine("2.3")
    sound = engine.sample(job(engine, AVLatent.sound_only(17, 24.0), guidance=HQ, evaluation=evaluation))
    assert sound.latents.video is None
    decoded = engine.decode(sound, "auto")
    assert decoded.frames is None
    assert decoded.waveform.shape[-1] == 480 * (4 * CLIP.audio_latents - 3)
    silent = engine.sample(job(engine, AVLatent.video_only(CLIP), guidance=HQ, evaluation=evaluation))
    assert silent.latents.audio is None
    decoded = engine.decode(silent, "auto")
    assert decoded.waveform is None
    assert decoded.frames.shape == (17, 64, 96, 3)


def test_generated_keyframes_need_their_version(tiny_engine):
    engine = tiny_engine("2.3")
    latent = AVLatent(CLIP).with_condition(CONDITIONS["generated keyframes"]((8,)))
    with pytest.raises(ValueError, match=r"need LTX-2\.5; this is LTX-2\.3"):
        engine.sample(job(engine, latent))


def test_a_clip_too_small_to_decode_is_said_before_sampling(tiny_engine):
    engine = tiny_engine("2.0")
    with pytest.raises(ValueError, match="64x64 pixels or more"):
        engine.sample(job(engine, AVLatent(ClipShape(9, 32, 64, 24.0))))


def test_guidance_on_a_distilled_checkpoint_is_warned_about(tiny_engine, caplog, monkeypatch):
    engine = tiny_engine("2.3")
    name = engine.files.spec.checkpoint.with_name("ltx-2.3-22b-distilled.safetensors")
    monkeypatch.setattr(engine, "files", replace(engine.files, spec=replace(engine.files.spec, checkpoint=name)))
    engine.sample(job(engine, guidance=HQ, sigmas=(1.0, 0.0)))
    assert "distilled" in caplog.text
