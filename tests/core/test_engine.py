"""The engine on tiny checkpoints: whole jobs, their repeatability, their errors, and stopping them."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.condition_encoders import ModelEncoders
from ltx2_engine.ltx2_core.conditioning.image import ImageCondition
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.conditioning.native import from_native
from ltx2_engine.ltx2_core.evaluate import batched_evaluate, split_evaluate
from ltx2_engine.ltx2_core.handles import open_engine
from ltx2_engine.ltx2_core.host import Interrupted, use_host
from ltx2_engine.ltx2_core.job import SampleJob
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.presets import DISTILLED_SIGMAS
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.sampling.samplers import SamplerChoice
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.ltx2_core.testing import assert_close
from ltx2_engine.ltx2_core.text.context import Context
from ltx2_engine.ltx2_core.tiny import TEXT_ENCODER, checkpoint_file
from ltx2_engine.ltx2_core.vae.layers import TimeConv3d

CLIP = ClipShape(17, 64, 96, 24.0)
GUIDED = StreamGuidance(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(1,))
OFF = StreamGuidance()


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(params=["2.0", "2.3"])
def engine(request, tiny_engine):
    return tiny_engine(request.param)


def image(seed=0):
    return torch.rand(70, 110, 3, generator=torch.Generator().manual_seed(seed))


def encoded(engine, latent):
    """The first image of a latent as the engine encodes it."""
    encoders = ModelEncoders(engine)
    return encoders.video(latent.conditions[0].pixels(CLIP, encoders.default_crf))


def job(engine, *, guidance=OFF, sigmas=(1.0, 0.6, 0.0), seed=3, latent=None):
    latent = AVLatent(CLIP) if latent is None else latent
    positive, negative = engine.encode("a bell rings"), engine.encode("blurry")
    return SampleJob(latent, positive, negative, AV(guidance, guidance), sigmas, SamplerChoice("euler"), seed)


def test_a_seed_gives_the_same_bits_and_another_seed_another_clip(engine):
    first, again, other = (engine.sample(job(engine, seed=seed)).latents for seed in (3, 3, 4))
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.audio, again.audio)
    assert not torch.allclose(first.video, other.video, atol=0.1)
    assert not torch.allclose(first.audio, other.audio, atol=0.1)


@pytest.mark.parametrize("frames_fps", [(1, 24.0), (9, 24.0), (17, 30.0), (25, 12.5)])
def test_decoding_gives_the_frames_asked_for_and_the_sound_that_goes_with_them(engine, frames_fps):
    frames, fps = frames_fps
    clip = ClipShape(frames, 64, 96, fps)
    decoded = engine.decode(engine.sample(job(engine, latent=AVLatent(clip), sigmas=(1.0, 0.0))), "auto")
    assert decoded.frames.shape == (frames, 64, 96, 3)
    assert decoded.frames.dtype == torch.float32
    assert float(decoded.frames.min()) >= 0
    assert float(decoded.frames.max()) <= 1
    latents = round(25 * frames / fps)
    per_mel_frame = 240 if engine.files.version.label == "2.0" else 480
    assert decoded.waveform.shape == (1, 2, per_mel_frame * (4 * latents - 3))
    assert decoded.sample_rate == 100 * per_mel_frame
    assert 0.005 < float(decoded.waveform.std()) < 0.6
    assert float(decoded.frames.std()) > 0.05


def test_every_tiling_decodes_the_same_clip(engine):
    sampled = engine.sample(job(engine, sigmas=(1.0, 0.0)))
    whole = engine.decode(sampled, "none").frames
    assert_close("streamed against whole", engine.decode(sampled, "temporal").frames, whole, 1e-5)
    assert engine.decode(sampled, "spatial").frames.shape == whole.shape


def test_the_first_image_is_kept(engine):
    latent = AVLatent(CLIP).with_condition(ImageCondition(image(), 1.0, crf=0))
    want = encoded(engine, latent)
    got = engine.sample(job(engine, latent=latent)).latents.video
    assert_close("first latent frame", got[:, :, :1], want, 1e-5)
    free = engine.sample(job(engine)).latents.video
    assert not torch.allclose(got[:, :, 1:], free[:, :, 1:], atol=1e-3), "the rest of the clip ignores the image"


def test_a_weak_image_is_changed_by_the_model(engine):
    strong, weak = (
        engine.sample(job(engine, latent=AVLatent(CLIP).with_condition(ImageCondition(image(), strength, crf=0))))
        for strength in (1.0, 0.5)
    )
    assert not torch.allclose(strong.latents.video[:, :, :1], weak.latents.video[:, :, :1], atol=1e-3)


def test_image_compression_follows_the_version(engine):
    """33 before 2.4, so the default equals that number and differs from none."""
    latents = [
        encoded(engine, AVLatent(CLIP).with_condition(ImageCondition(image(), 1.0, crf=crf))) for crf in (None, 33, 0)
    ]
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])


def test_batched_passes_equal_single_calls(engine):
    """One call of all passes against one call a pass, with the flags as keyword arguments."""
    passes = plan_passes(AV(GUIDED, GUIDED))
    one = job(engine, guidance=GUIDED)
    latent = AVLatent(CLIP).with_condition(ImageCondition(image(), 0.8, crf=0))
    states = latent.conditioned(engine._states(latent), ModelEncoders(engine))
    model = engine._networks["transformer"].use(0)
    x = states.map(lambda state: torch.randn(state.latent.shape, generator=torch.Generator().manual_seed(1)))

    def evaluate(kind, passes):
        prompts = one.positive.features, one.negative.features
        return kind(model, states, passes, *prompts, lambda: None)(x, 0.7, AV(True, True))

    assert [p.name for p in passes] == ["cond", "uncond", "perturbed", "isolated"]
    together = evaluate(batched_evaluate, passes)
    for single, batched in zip(passes, together, strict=True):
        (alone,) = evaluate(split_evaluate, (single,))
        assert_close(f"{single.name} video", batched.video, alone.video, 1e-5)
        assert_close(f"{single.name} audio", batched.audio, alone.audio, 1e-5)
    assert len({float(part.video.sum()) for part in together}) == 4, "passes that should differ are equal"


def test_guidance_changes_the_clip(engine):
    plain, guided = (engine.sample(job(engine, guidance=g)).latents for g in (OFF, GUIDED))
    assert not torch.allclose(plain.video, guided.video, atol=0.05)
    assert not torch.allclose(plain.audio, guided.audio, atol=0.05)


def test_two_clips_in_a_batch_equal_one_at_a_time(engine):
    """Latents of two clips, half kept: what one clip holds does not reach the other."""
    one = engine.sample(job(engine)).latents
    other = engine.sample(job(engine, seed=5)).latents
    both = one.map(lambda a, b: torch.cat((a, b)), other)
    keep = AV(torch.zeros(2, 1, *CLIP.grid), torch.zeros(2, 1, CLIP.audio_latents, 1))
    kept = engine.sample(job(engine, latent=AVLatent(CLIP, both, keep))).latents
    assert_close("kept video", kept.video, both.video, 1e-5)
    assert_close("kept audio", kept.audio, both.audio, 1e-5)


def test_a_native_latent_survives_the_way_in_and_out(engine):
    sampled = engine.sample(job(engine))
    masks = (torch.zeros(1, 1, CLIP.latent_frames, 1, 1), None)
    taken = from_native((sampled.latents.video, sampled.latents.audio), masks, CLIP.fps)
    assert taken.clip == CLIP
    assert taken.masks.video.shape == (1, 1, *CLIP.grid)
    again = engine.sample(job(engine, latent=taken, seed=9)).latents
    assert_close("kept video", again.video, sampled.latents.video, 1e-5)
    assert not torch.allclose(again.audio, sampled.latents.audio, atol=0.05), "the sound has no mask: it is made anew"


@pytest.mark.parametrize("mask", [-torch.ones(3, 2, 3), torch.full((2, 3), float("nan"))])
def test_native_masks_that_drop_tokens_are_refused(engine, mask):
    video, audio = torch.zeros(1, 16, *CLIP.grid), torch.zeros(1, 2, 18, 16)
    with pytest.raises(ValueError, match="Crop Guides"):
        from_native((video, audio), (mask, None), 24.0)


def test_native_conditioning_equals_the_own_prompt_node(engine):
    """Processed conditioning is taken as it is: both connector outputs side by side."""
    context = engine.encode("a bell rings")
    joined = torch.cat(tuple(context.features.present()), dim=-1)
    taken = engine.encode_native([[joined, {"pooled_output": None}]])
    assert torch.equal(taken.features.video, context.features.video)
    assert torch.equal(taken.features.audio, context.features.audio)


def test_an_interrupt_stops_at_once_and_leaves_the_engine_usable(engine, tmp_path):
    class Stopping(StandaloneHost):
        polls = 0

        def check_interrupt(self):
            self.polls += 1
            if self.polls > 5:
                raise Interrupted

    want = engine.sample(job(engine)).latents.video
    one = job(engine, sigmas=DISTILLED_SIGMAS)
    with use_host(Stopping(output_dir=tmp_path, progress="quiet")) as host, pytest.raises(Interrupted):
        engine.sample(one)
    assert host.polls == 6, "the poll that raised was not the last thing that happened"
    assert torch.equal(engine.sample(job(engine)).latents.video, want)


@pytest.mark.parametrize("tiling", ["none", "temporal", "spatial"])
def test_an_interrupt_of_a_decode_does_not_wait_for_the_clip(engine, tmp_path, monkeypatch, tiling):
    """Sixteen layers or more, each of a fifth of a second."""
    sampled = engine.sample(job(engine, sigmas=(1.0, 0.0)))
    convolve = TimeConv3d.convolve

    def slow(self, *seen):
        time.sleep(0.2)
        return convolve(self, *seen)

    monkeypatch.setattr(TimeConv3d, "convolve", slow)
    with use_host(StandaloneHost(output_dir=tmp_path, progress="quiet")) as host:
        timer = threading.Timer(0.5, host.interrupt)
        timer.start()
        start = time.perf_counter()
        with pytest.raises(Interrupted):
            engine.decode(sampled, tiling)
        timer.join()
        assert time.perf_counter() - start < 1.5


def test_weights_go_when_memory_is_asked_back_and_return_when_needed(engine):
    want = engine.sample(job(engine)).latents.video
    parts = [*engine._networks.values(), engine._text_encoder]
    held = sum(part.bytes_on("cpu") for part in parts)
    assert held > 0
    assert sum(part.release("cpu", None) for part in parts) == held
    assert sum(part.bytes_on("cpu") for part in parts) == 0
    assert torch.equal(engine.sample(job(engine)).latents.video, want)


def test_an_engine_is_shared_by_handles_and_dies_with_them(tiny_models):
    spec = ModelSpec.of(
        tiny_models / "checkpoints" / checkpoint_file("2.3"),
        tiny_models / "text_encoders" / TEXT_ENCODER,
        dtype="bfloat16",
        device="cpu",
    )
    engine = open_engine(spec)
    assert open_engine(spec) is engine
    parts = list(engine._networks.values())
    context = engine.encode("x")
    assert any(part.bytes_on("cpu") for part in parts)
    assert context.features.video.dtype == torch.bfloat16
    del engine
    assert not any(part.bytes_on("cpu") for part in parts), "weights outlived the last handle"


def test_bfloat16_runs_and_stays_close_to_float32(tiny_models, tiny_engine):
    spec = replace(tiny_engine("2.3").files.spec, dtype="bfloat16")
    half, full = open_engine(spec), tiny_engine("2.3")
    a, b = (e.sample(job(e, sigmas=(1.0, 0.0))).latents for e in (half, full))
    assert torch.isfinite(a.video).all()
    # the noise is drawn in the latent's dtype, where the CPU's bfloat16 draw is the float32 draw rounded
    assert_close("bfloat16 against float32 video", a.video, b.video, 0.1)
    assert_close("bfloat16 against float32 audio", a.audio, b.audio, 0.1)


# errors -----------------------------------------------------------------------------------------------------------


def test_cfg_needs_a_negative_prompt(engine):
    with pytest.raises(ValueError, match="needs a negative prompt"):
        engine.sample(replace(job(engine, guidance=GUIDED), negative=None))


def test_blocks_that_do_not_exist_are_named(engine):
    with pytest.raises(ValueError, match=r"stg_blocks \[28\] do not exist: this model has blocks 0 to 2"):
        engine.sample(job(engine, guidance=replace(GUIDED, stg_blocks=(28,))))


def test_a_prompt_of_another_model_is_refused(tiny_engine):
    one = replace(job(tiny_engine("2.3")), positive=tiny_engine("2.0").encode("x"))
    with pytest.raises(ValueError, match="encoded for another model"):
        tiny_engine("2.3").sample(one)


def test_a_latent_of_another_model_is_refused(engine):
    wrong = AVLatent(CLIP, AV(torch.zeros(1, 128, *CLIP.grid), torch.zeros(1, 8, 18, 16)))
    with pytest.raises(ValueError, match="this model and clip need"):
        engine.sample(job(engine, latent=wrong))


def test_decoding_what_was_not_sampled_is_refused(engine):
    with pytest.raises(ValueError, match="connect the sampler's output"):
        engine.decode(AVLatent(CLIP), "auto")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -2000.0])
def test_guidance_must_be_a_sane_number(value):
    with pytest.raises(ValueError, match="must be a number"):
        StreamGuidance(cfg=value)


def test_contexts_have_short_descriptions(engine):
    """ComfyUI puts the text of every input into its error messages."""
    context = engine.encode("x")
    assert isinstance(context, Context)
    for value in (context, engine.sample(job(engine, sigmas=(1.0, 0.0))), CLIP):
        assert len(str(value)) < 300
