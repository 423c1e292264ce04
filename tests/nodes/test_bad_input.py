"""Bad input through the command line: a clear message, the right exit code, and nothing written."""

import json
import shutil
import struct

import pytest
import torch
from ltx2_engine import cli
from ltx2_engine.ltx2_core.loading.write import write_checkpoint
from ltx2_engine.ltx2_core.media import write_audio
from ltx2_engine.ltx2_core.tiny import TEXT_ENCODER, checkpoint_file, write_tiny_checkpoint, write_tiny_split
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from ltx2_engine.ltx2_core.tiny_upsampler import upsampler_file, write_tiny_upsampler
from PIL import Image
from safetensors.torch import load_file

BAD_RUN, INVALID = 1, 2


@pytest.fixture
def models(tiny_models, tmp_path):
    """A model folder of its own, so that a test may spoil it."""
    return shutil.copytree(tiny_models, tmp_path / "models")


@pytest.fixture
def run(request, models, tmp_path, capfd):
    """Run a shipped workflow with settings; returns the exit code and what was said."""

    def run(*settings, flow="text_to_video"):
        defaults = {
            "LTX2LoadModel.checkpoint": checkpoint_file("2.3"),
            "LTX2LoadModel.text_encoder": TEXT_ENCODER,
            "LTX2EmptyLatent.width": 64,
            "LTX2EmptyLatent.height": 64,
            "LTX2EmptyLatent.frames": 9,
        }
        chosen = defaults | dict(setting.split("=", 1) for setting in settings)
        sets = [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
        places = ["--models", str(models), "--input", str(tmp_path / "input"), "--output", str(tmp_path / "output")]
        workflow = request.path.parents[2] / "workflows" / "api" / f"{flow}.json"
        code = cli.main(["run", str(workflow), *sets, *places])
        said = capfd.readouterr()
        written = [path for path in (tmp_path / "output").rglob("*") if path.is_file()]
        assert code == 0 or not written, f"half-written: {written}"
        return code, said.out + said.err

    (tmp_path / "input").mkdir()
    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["LTX2EmptyLatent.width=100"], "width 100 is not a multiple of 32. Nearest: 96 or 128"),
        (["LTX2EmptyLatent.height=31"], "height 31"),
        (["LTX2EmptyLatent.frames=120"], "Nearest: 113 or 121"),
        (["LTX2EmptyLatent.frames=0"], "0 frames"),
        (
            ["LTX2EmptyLatent.width=8192", "LTX2EmptyLatent.height=8192", "LTX2EmptyLatent.frames=8193"],
            "tokens; at most",
        ),
        (["LTX2EmptyLatent.width=99999999999"], "out of range"),
        (["LTX2EmptyLatent.fps=NaN"], "not a finite number"),
        (["LTX2EmptyLatent.fps=Infinity"], "not a finite number"),
        (["LTX2EmptyLatent.fps=fast"], "Failed to convert an input value to a FLOAT value: fps, fast"),
        (["LTX2EmptyLatent.fps=0.5"], "frames per second"),
        (["LTX2EmptyLatent.seconds=900"], "cannot be made"),
        (["LTX2Guider.video_cfg=NaN"], "not a finite number"),
        (["LTX2Guider.video_cfg=1e9"], "video_cfg"),
        (["LTX2Guider.stg_blocks=28;29"], "separated by commas"),
        (["LTX2Sigmas.steps=0"], "steps"),
        (["LTX2Sigmas.schedule=karras"], "schedule"),
        (["LTX2Sampler.seed=-1"], "seed"),
        (["LTX2LoadModel.checkpoint=../../secret.safetensors"], "checkpoint"),
        (["LTX2LoadModel.checkpoint=/etc/passwd"], "checkpoint"),
        (["LTX2LoadModel.checkpoint=C:\\models\\x.safetensors"], "checkpoint"),
        (["LTX2LoadModel.text_encoder=../checkpoints"], "text_encoder"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(run, settings, message):
    code, said = run(*settings)
    assert code == INVALID, said
    assert message in said


@pytest.mark.parametrize("steps", ["NaN", "8.5e400"])
def test_numbers_that_are_not_numbers(run, steps):
    code, said = run(f"LTX2Sigmas.terminal={steps}")
    assert code == INVALID, said


def spoil(models, spoiler):
    path = models / "checkpoints" / checkpoint_file("2.3")
    spoiler(path)
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def overlapping(path):
    raw = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        }
    ).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(12))


def wrong_size(path):
    raw = json.dumps({"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))


def pickle_in_disguise(path):
    torch.save({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("spoiler", "message"),
    [
        (cut, "download"),
        (bomb, "header"),
        (overlapping, "overlap"),
        (wrong_size, "shape"),
        (pickle_in_disguise, "pickle"),
        (lambda path: path.write_bytes(b""), "safetensors"),
        (lambda path: path.write_text("<html>404</html>"), "web page"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git"),
    ],
)
def test_broken_files_are_named_with_what_to_do(run, models, spoiler, message):
    path = spoil(models, spoiler)
    code, said = run()
    assert code == BAD_RUN, said
    assert path.name in said
    assert message.lower() in said.lower(), said
    assert "Traceback" not in said


def without(prefix):
    def spoiler(path):
        metadata = {"config": json.dumps(json.loads(config_of(path))), "model_version": "2.3.0"}
        write_checkpoint(path, {n: t for n, t in load_file(path).items() if not n.startswith(prefix)}, metadata)

    return spoiler


def config_of(path):
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))["__metadata__"]["config"]


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("vae.", "no video VAE"),
        ("audio_vae.", "no audio VAE"),
        ("vocoder.", "no vocoder"),
        ("text_embedding_projection.", "no text projection"),
        ("model.diffusion_model.transformer_blocks.1.", "transformer_blocks.1."),
    ],
)
def test_missing_parts_are_named(run, models, prefix, message):
    spoil(models, without(prefix))
    code, said = run()
    assert code == BAD_RUN, said
    assert message in said


def test_a_transformer_alone_says_what_would_fit(run, models):
    write_tiny_checkpoint(models / "checkpoints" / "ltx-2.5-tiny.safetensors", "2.5")
    code, said = run("LTX2LoadModel.checkpoint=ltx-2.5-tiny.safetensors")
    assert code == BAD_RUN
    assert "no video VAE, no audio VAE, no vocoder" in said
    assert "ltx-2.5-video-vae-conv-*" in said


def test_all_files_that_do_not_fit_are_named_at_once(run, models):
    from ltx2_engine.ltx2_core.text.tiny_gemma import write_tiny_gemma

    write_tiny_gemma(models / "text_encoders" / "other", hidden_size=32)
    write_tiny_split(models, "2.0")
    code, said = run(
        "LTX2LoadModel.text_encoder=other",
        "LTX2LoadModel.video_vae=ltx-2.0-tiny-video-vae.safetensors",
        "LTX2LoadModel.audio_vae=ltx-2.0-tiny-video-vae.safetensors",
    )
    assert code == BAD_RUN
    assert "3 of 4 files cannot be used" in said
    assert "its latents are of LTX-2.0, but the transformer is of LTX-2.3" in said
    assert "it holds no audio VAE" in said
    assert "6 layers of width 32" in said


@pytest.mark.parametrize("name", ["missing.safetensors", "../checkpoints/x.safetensors", "/etc/passwd"])
@pytest.mark.parametrize("field", ["video_vae", "audio_vae", "text_projection"])
def test_component_files_must_be_listed(run, field, name):
    code, said = run(f"LTX2LoadModel.{field}={name}")
    assert code == INVALID
    assert field in said


def test_a_text_encoder_of_another_size_is_refused(run, models):
    from ltx2_engine.ltx2_core.text.tiny_gemma import write_tiny_gemma

    write_tiny_gemma(models / "text_encoders" / "other", hidden_size=32)
    code, said = run("LTX2LoadModel.text_encoder=other")
    assert code == BAD_RUN
    assert "6 layers of width 32" in said
    assert "6 layers of width 64" in said


def test_a_text_encoder_without_its_tokenizer_says_so(run, models):
    for path in (models / "text_encoders" / TEXT_ENCODER).glob("tokenizer*"):
        path.unlink()
    code, said = run()
    assert code == BAD_RUN
    assert "tokenizer" in said


def test_blocks_that_the_model_does_not_have(run):
    code, said = run("LTX2Guider.video_stg=1.0")
    assert code == BAD_RUN
    assert "stg_blocks [28] do not exist" in said


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_an_unreadable_image_is_refused(run, tmp_path, content):
    (tmp_path / "input" / "photo.png").write_bytes(content)
    code, said = run("LoadImage.image=photo.png", flow="image_to_video")
    assert code in (BAD_RUN, INVALID)
    assert "photo.png" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["missing.png", "../models/x.png", "/etc/hostname"])
def test_an_image_that_is_not_in_the_input_folder_is_refused(run, name):
    code, said = run(f"LoadImage.image={name}", flow="image_to_video")
    assert code in (BAD_RUN, INVALID)
    assert name.rsplit("/", 1)[-1] in said


def test_a_link_out_of_the_model_folder_is_refused(run, models, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.copy(models / "checkpoints" / checkpoint_file("2.3"), outside)
    (models / "checkpoints" / "link.safetensors").symlink_to(outside)
    code, said = run("LTX2LoadModel.checkpoint=link.safetensors")
    assert code in (BAD_RUN, INVALID)
    assert "link.safetensors" in said


# two stages, LoRAs, keyframes, sound ----------------------------------------------------------------------------------


@pytest.fixture
def hq(run, models):
    """Run the HQ workflow with tiny files and few steps."""
    write_tiny_lora(models / "loras" / "distilled.safetensors", models / "checkpoints" / checkpoint_file("2.3"))
    for kind in ("2.0-spatial-x2", "2.3-spatial-x2"):
        write_tiny_upsampler(models / "latent_upscale_models" / upsampler_file(kind), kind)
    files = ("4.lora=distilled.safetensors", "5.lora=distilled.safetensors")
    upsampler = f"LTX2UpscaleLatent.upsampler={upsampler_file('2.3-spatial-x2')}"

    def run_hq(*settings):
        return run(*files, upsampler, "8.steps=2", *settings, flow="hq_two_stage")

    return run_hq


def test_good_two_stage_input_runs(hq):
    code, said = hq()
    assert code == 0, said


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (["4.lora=missing.safetensors"], INVALID, "missing.safetensors"),
        (["4.lora=../checkpoints/x.safetensors"], INVALID, "lora"),
        (["5.strength=99"], INVALID, "strength"),
        (["5.strength=NaN"], INVALID, "not a finite number"),
        (["LTX2UpscaleLatent.upsampler=missing.safetensors"], INVALID, "missing.safetensors"),
        ([f"LTX2UpscaleLatent.upsampler={upsampler_file('2.0-spatial-x2')}"], BAD_RUN, "this upsampler is for LTX-2.0"),
        (["9.eta=1.5"], INVALID, "eta"),
        (["9.sampler=heun"], INVALID, "heun"),
        (["9.sde_seed=-2"], INVALID, "sde_seed"),
    ],
)
def test_two_stage_input_that_does_not_fit(hq, settings, code, message):
    got, said = hq(*settings)
    assert got == code, said
    assert message in said


def test_an_upsampler_that_does_not_fit_is_refused_before_anything_is_sampled(hq):
    code, said = hq(f"LTX2UpscaleLatent.upsampler={upsampler_file('2.0-spatial-x2')}")
    assert code == BAD_RUN
    assert "this upsampler is for LTX-2.0" in said
    assert "sampling" not in said


def test_a_lora_that_fits_nothing_says_what_it_looks_like(hq, models):
    checkpoint = models / "checkpoints" / checkpoint_file("2.3")
    shutil.copy(checkpoint, models / "loras" / "no-lora.safetensors")
    code, said = hq("4.lora=no-lora.safetensors")
    assert code == BAD_RUN
    assert "no-lora.safetensors" in said
    assert "LoRA" in said


@pytest.mark.parametrize("frame", [500, -500])
def test_a_keyframe_outside_the_clip(hq, run, tmp_path, frame):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64), "teal").save(tmp_path / "input" / name)
    code, said = run(
        "6.image=a.png",
        "7.image=b.png",
        f"8.frame={frame}",
        "10.stg_blocks=1",
        "4.lora=distilled.safetensors",
        f"LTX2UpscaleLatent.upsampler={upsampler_file('2.3-spatial-x2')}",
        flow="keyframe_interpolation",
    )
    assert code == BAD_RUN, said
    assert f"the keyframe at frame {frame} is outside the clip, which has frames 0 to 8" in said


def test_a_sound_shorter_than_the_clip(hq, run, tmp_path):
    write_audio(tmp_path / "input" / "short.wav", {"waveform": torch.zeros(1, 2, 1600), "sample_rate": 16000})
    code, said = run(
        "6.audio=short.wav",
        "4.lora=distilled.safetensors",
        f"LTX2UpscaleLatent.upsampler={upsampler_file('2.3-spatial-x2')}",
        flow="audio_to_video",
    )
    assert code == BAD_RUN, said
    assert "lasts 0.10 s, the clip 0.38 s" in said


def test_good_input_runs(run):
    """The other tests would mean nothing if this did not."""
    code, said = run()
    assert code == 0, said
    assert ".mp4" in said
