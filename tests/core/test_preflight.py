"""The check of a whole set of files: everything that is wrong in one message, each with what would fit."""

import json
import re
import shutil

import pytest
import torch
from ltx2_engine.ltx2_core import tiny as tiny_module
from ltx2_engine.ltx2_core.config.version import ModelVersion
from ltx2_engine.ltx2_core.file_kinds import AUDIO_VAE, PROJECTION, UPSAMPLER, VIDEO_VAE, Release
from ltx2_engine.ltx2_core.fits import latent_space, misfit, what_fits
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError
from ltx2_engine.ltx2_core.loading.write import write_checkpoint
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.preflight import PreflightError, open_files, preflight
from ltx2_engine.ltx2_core.text.tiny_gemma import write_tiny_gemma, write_tiny_gemma4
from ltx2_engine.ltx2_core.tiny import split_file, tiny_config, write_tiny_set, write_tiny_split
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from ltx2_engine.ltx2_core.tiny_upsampler import write_tiny_upsampler
from safetensors import safe_open
from safetensors.torch import load_file

FIELDS = ("checkpoint", "video_vae", "audio_vae", "text_projection")


class Files:
    """Tiny files of all releases; ``of(label)`` are those of one model, by the fields of a ModelSpec."""

    def __init__(self, root):
        self.root = root
        self.sets = {"2.3": write_tiny_set(root, "2.3", "split"), "2.5": write_tiny_set(root, "2.5")}
        self.sets["2.0"] = [*write_tiny_split(root, "2.0"), self.sets["2.3"][4]]
        self.full = write_tiny_set(root, "2.3")[0]

    def of(self, label, **changes):
        *model, encoder = (path for path in self.sets[label] if path.parent.name in PLACES)
        if label == "2.3":
            model, encoder = self.sets[label][:4], self.sets[label][4]
        return {**dict(zip(FIELDS, model, strict=False)), "text_encoder": encoder} | changes

    def part(self, label, kind):
        return self.root / split_file(label, kind)

    def lora(self, label):
        return self.root / "loras" / f"ltx-{label}-lora-tiny.safetensors"

    def upsampler(self, kind):
        path = self.root / f"{kind}.safetensors"
        write_tiny_upsampler(path, kind)
        return path


PLACES = ("diffusion_models", "vae", "text_encoders")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("models"))


def check(paths, loras=(), upsamplers=()):
    spec = ModelSpec.of(**{name: path for name, path in paths.items() if path}, dtype="auto", device="cpu")
    for lora in loras:
        spec = spec.with_lora(lora, 1.0)
    return preflight(spec, upsamplers)


def problems(report):
    """(role, file name) -> the problems of that file."""
    return {(entry.role, entry.path.name): entry.problems for entry in report.entries if entry.problems}


def only_problem(report):
    [(where, [problem])] = problems(report).items()
    return where, problem


# sets that fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["2.0", "2.3", "2.5"])
def test_files_of_one_release_fit(tiny, label):
    kind = "2.0-spatial-x2" if label == "2.0" else "2.3-spatial-x2"
    loras = [] if label == "2.0" else [tiny.lora(label)]
    report = check(tiny.of(label), loras, [tiny.upsampler(kind)])
    assert problems(report) == {}
    assert report.require().version.label == label
    assert str(report).startswith("These files fit:\ncheckpoint ")
    roles = [entry.role for entry in report.entries]
    projection = [] if label == "2.5" else ["text projection"]
    assert roles == [
        "checkpoint",
        "video VAE",
        "audio VAE",
        *projection,
        "text encoder",
        *["LoRA"] * len(loras),
        "upsampler",
    ]


def test_the_video_vae_of_2_3_fits_2_5(tiny):
    assert problems(check(tiny.of("2.5", video_vae=tiny.part("2.3", "video-vae")))) == {}


def test_nothing_but_headers_is_read(tiny, monkeypatch):
    from ltx2_engine.ltx2_core.loading import staged

    monkeypatch.setattr(staged, "read_staged", None)
    assert problems(check(tiny.of("2.3"))) == {}


# one thing wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "kind", "role", "said"),
    [
        (
            "video_vae",
            "video-vae",
            "video VAE",
            "its latents are of LTX-2.0, but the transformer is of LTX-2.3: choose a video VAE",
        ),
        (
            "audio_vae",
            "audio-vae",
            "audio VAE",
            "it is of LTX-2.0, but the transformer is of LTX-2.3: choose an audio VAE",
        ),
    ],
)
def test_a_vae_of_another_release(tiny, field, kind, role, said):
    path = tiny.part("2.0", kind)
    where, problem = only_problem(check(tiny.of("2.3", **{field: path})))
    assert where == (role, path.name)
    assert problem.startswith(said)
    assert "ltx-2.3-22b-*.safetensors" in problem


def test_the_audio_vae_of_2_3_does_not_fit_2_5(tiny):
    where, problem = only_problem(check(tiny.of("2.5", audio_vae=tiny.part("2.3", "audio-vae"))))
    assert where == ("audio VAE", "ltx-2.3-tiny-audio-vae.safetensors")
    assert problem == (
        "it is of LTX-2.3, but the transformer is of LTX-2.5: choose the audio VAE file of LTX-2.5 with its vocoder "
        "(ltx-2.5-audio-vae-*)"
    )


def test_the_projection_of_another_release(tiny):
    path = tiny.part("2.0", "text-projection")
    report = check(tiny.of("2.3", text_projection=path))
    [(where, said)] = problems(report).items()
    assert where == ("text projection", path.name)
    assert any("it is of LTX-2.0, but the transformer is of LTX-2.3" in problem for problem in said)


def test_a_vae_of_another_size_names_both_numbers(tiny, tmp_path, monkeypatch):
    path = tmp_path / "wide.safetensors"
    monkeypatch.setattr("ltx2_engine.ltx2_core.tiny._LATENT_CHANNELS", 32)
    monkeypatch.setitem(tiny_module._TRANSFORMER, "in_channels", 32)
    shutil.move(write_tiny_split(tmp_path, "2.3")[1], path)
    where, problem = only_problem(check(tiny.of("2.3", video_vae=path)))
    assert where == ("video VAE", "wide.safetensors")
    assert "its video latents have 32 channels, but the transformer's tokens have 16" in problem


def test_missing_parts_are_said_once_with_what_would_fit(tiny):
    paths = tiny.of("2.3")
    where, problem = only_problem(check({name: paths[name] for name in ("checkpoint", "text_encoder")}))
    assert where == ("checkpoint", paths["checkpoint"].name)
    assert problem.startswith("it has no text projection, no video VAE, no audio VAE, no vocoder. Choose: ")
    assert problem.count("an audio VAE file with its vocoder of LTX-2.3") == 1
    assert [problem.count(f", as {name}") for name in ("text_projection", "video_vae", "audio_vae")] == [1, 1, 1]


def test_a_transformer_of_2_5_alone_names_the_files_of_its_release(tiny):
    paths = tiny.of("2.5")
    said = str(check({name: paths[name] for name in ("checkpoint", "text_encoder")}))
    assert "ltx-2.5-video-vae-conv-*" in said
    assert "ltx-2.5-audio-vae-*" in said
    assert "text projection" not in said, "the text encoder has it"


def test_a_file_that_lacks_what_it_was_chosen_for(tiny):
    where, problem = only_problem(check(tiny.of("2.3", video_vae=tiny.part("2.3", "audio-vae"))))
    assert where == ("video VAE", "ltx-2.3-tiny-audio-vae.safetensors")
    assert problem.startswith("it holds no video VAE: choose a video VAE file of LTX-2.3 or 2.5")


def test_an_audio_vae_without_its_vocoder(tiny, tmp_path):
    source, path = tiny.part("2.3", "audio-vae"), tmp_path / "audio.safetensors"
    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
    write_checkpoint(path, {n: t for n, t in load_file(source).items() if not n.startswith("vocoder.")}, metadata)
    where, problem = only_problem(check(tiny.of("2.3", audio_vae=path)))
    assert where == ("audio VAE", "audio.safetensors")
    assert problem.startswith("it has no vocoder. Choose: an audio VAE file with its vocoder of LTX-2.3")
    assert problems(check(tiny.of("2.3", checkpoint=tiny.full, audio_vae=path))) == {}, "the checkpoint has one"


def test_the_checkpoint_must_hold_a_transformer(tiny):
    report = check({"checkpoint": tiny.part("2.3", "video-vae"), "text_encoder": tiny.of("2.3")["text_encoder"]})
    where, problem = only_problem(report)
    assert where == ("checkpoint", "ltx-2.3-tiny-video-vae.safetensors")
    assert problem.startswith("it holds no transformer: choose a full checkpoint of LTX-2 (ltx-2-19b-*.safetensors")


def test_a_lora_is_no_checkpoint(tiny):
    report = check({"checkpoint": tiny.lora("2.3"), "text_encoder": tiny.of("2.3")["text_encoder"]})
    where, _ = only_problem(report)
    assert where == ("checkpoint", "ltx-2.3-lora-tiny.safetensors")
    assert "a LoRA" in report.entries[0].what


@pytest.mark.parametrize("metadata", [{}, {"config": json.dumps({"vae": {"_class_name": "CausalDiffusionVAE"}})}])
def test_the_diffusion_decoder_says_which_file_to_take(tiny, tmp_path, metadata):
    tensors = {"decoder.conv_in_x_t.weight": torch.zeros(2, 2), "encoder.conv_in.conv.weight": torch.zeros(2, 2)}
    path = tmp_path / "ltx-2.5-video-vae.safetensors"
    write_checkpoint(path, tensors, metadata | {"model_version": "2.5.0"})
    where, problem = only_problem(check(tiny.of("2.5", video_vae=path)))
    assert where == ("video VAE", path.name)
    assert "diffusion decoder" in problem
    assert "ltx-2.5-video-vae-conv-*" in problem


def test_a_broken_file_does_not_hide_the_others(tiny, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(tiny.part("2.3", "video-vae").read_bytes()[:100_000])
    report = check(tiny.of("2.3", video_vae=broken, audio_vae=tiny.part("2.0", "audio-vae")))
    found = problems(report)
    assert list(found) == [("video VAE", "broken.safetensors"), ("audio VAE", "ltx-2.0-tiny-audio-vae.safetensors")]
    assert "the download is incomplete" in found["video VAE", "broken.safetensors"][0]


def test_a_lost_configuration_is_said_once(tiny, tmp_path, caplog):
    """The released sizes are then assumed, which these tiny files do not have."""
    path = tmp_path / "lost.safetensors"
    write_checkpoint(path, load_file(tiny.full), {})
    found = problems(check({"checkpoint": path, "text_encoder": tiny.of("2.3")["text_encoder"]}))
    assert [record.message for record in caplog.records if "carries no config" in record.message] == [
        "lost.safetensors carries no config: the released configuration of LTX 2.3 is assumed"
    ]
    assert found["checkpoint", "lost.safetensors"]


def test_missing_tensors_are_listed(tiny, tmp_path):
    source = tiny.part("2.3", "video-vae")
    path = tmp_path / "vae.safetensors"
    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: t for name, t in load_file(source).items() if name != "vae.decoder.conv_out.conv.weight"}
    write_checkpoint(path, tensors, metadata)
    where, problem = only_problem(check(tiny.of("2.3", video_vae=path)))
    assert where == ("video VAE", "vae.safetensors")
    assert re.search(r"1 missing: vae\.decoder\.conv_out\.conv\.weight", problem)


# text encoders --------------------------------------------------------------------------------------------------------


def test_a_text_encoder_of_another_size(tiny, tmp_path):
    write_tiny_gemma(tmp_path / "other", hidden_size=32)
    where, problem = only_problem(check(tiny.of("2.3", text_encoder=tmp_path / "other")))
    assert where == ("text encoder", "other")
    assert "6 layers of width 32" in problem
    assert "6 layers of width 64" in problem


def test_the_text_encoder_of_another_release(tiny):
    where, problem = only_problem(check(tiny.of("2.3", text_encoder=tiny.of("2.5")["text_encoder"])))
    assert where == ("text encoder", "gemma4-tiny-with-proj-ltx-2.5.safetensors")
    assert "of LTX-2.3, which was trained with Gemma 3" in problem


def test_gemma_3_with_2_5_lacks_the_projection_too(tiny):
    report = check(tiny.of("2.5", text_encoder=tiny.of("2.3")["text_encoder"]))
    found = problems(report)
    assert list(found) == [("checkpoint", "ltx-2.5-tiny-transformer.safetensors"), ("text encoder", "gemma-3-tiny")]
    assert "no text projection" in found["checkpoint", "ltx-2.5-tiny-transformer.safetensors"][0]
    assert "was trained with the text encoder 'gemma4-12b-ltx-v1'" in found["text encoder", "gemma-3-tiny"][0]


def test_googles_own_gemma_4_is_not_that_of_2_5(tiny, tmp_path):
    stock = tmp_path / "gemma4.safetensors"
    write_tiny_gemma4(stock, gemma_version=None)
    where, problem = only_problem(check(tiny.of("2.5", text_encoder=stock)))
    assert where == ("text encoder", "gemma4.safetensors")
    assert "of no stated version" in problem


# LoRAs and upsamplers -------------------------------------------------------------------------------------------------


def test_an_upsampler_of_another_release(tiny):
    path = tiny.upsampler("2.0-spatial-x2")
    where, problem = only_problem(check(tiny.of("2.3"), upsamplers=[path]))
    assert where == ("upsampler", path.name)
    assert problem.startswith("this upsampler is for LTX-2.0, but the model is LTX-2.3: choose one of LTX-2.3 or 2.5")


def test_a_lora_of_other_sizes(tiny, tmp_path):
    path = tmp_path / "lora.safetensors"
    name = "diffusion_model.transformer_blocks.0.attn1.to_q.lora_"
    write_checkpoint(path, {name + "A.weight": torch.zeros(4, 96), name + "B.weight": torch.zeros(96, 4)}, {})
    where, problem = only_problem(check(tiny.of("2.3"), [path]))
    assert where == ("LoRA", "lora.safetensors")
    assert "a LoRA for a model of other sizes" in problem


def test_a_lora_of_another_generation(tiny, tmp_path):
    path = tmp_path / "lora.safetensors"
    write_tiny_lora(path, tiny.part("2.3", "transformer"), targets="all")
    where, problem = only_problem(check(tiny.of("2.0"), [path]))
    assert where == ("LoRA", "lora.safetensors")
    assert "LTX-2.3" in problem


# several things wrong -------------------------------------------------------------------------------------------------


def test_everything_wrong_is_in_one_message(tiny, tmp_path):
    write_tiny_gemma(tmp_path / "narrow", hidden_size=32)
    upsampler = tiny.upsampler("2.0-spatial-x2")
    paths = tiny.of(
        "2.3",
        video_vae=tiny.part("2.0", "video-vae"),
        audio_vae=tiny.part("2.3", "video-vae"),
        text_encoder=tmp_path / "narrow",
    )
    report = check(paths, [tiny.lora("2.3"), upsampler], [upsampler, tiny.lora("2.3")])
    assert list(problems(report)) == [
        ("video VAE", "ltx-2.0-tiny-video-vae.safetensors"),
        ("audio VAE", "ltx-2.3-tiny-video-vae.safetensors"),
        ("text encoder", "narrow"),
        ("LoRA", "2.0-spatial-x2.safetensors"),
        ("upsampler", "2.0-spatial-x2.safetensors"),
        ("upsampler", "ltx-2.3-lora-tiny.safetensors"),
    ]
    with pytest.raises(PreflightError) as refused:
        report.require()
    said = str(refused.value)
    assert isinstance(refused.value, CheckpointError)
    assert said.startswith("6 of 9 files cannot be used:\nvideo VAE ")
    for entry in report.entries:
        assert str(entry.path) in said
        assert entry.what in said
    wrong, right = said.split("Nothing speaks against:\n")
    assert [line.split(" /")[0] for line in right.splitlines()] == ["checkpoint", "text projection", "LoRA"]
    assert wrong.count("choose") >= 4
    assert report.files is None


def test_open_files_raises_what_preflight_finds(tiny):
    paths = tiny.of("2.3", video_vae=tiny.part("2.0", "video-vae"))
    with pytest.raises(PreflightError, match="1 of 5 files cannot be used"):
        open_files(ModelSpec.of(**paths, dtype="auto", device="cpu"))


def test_a_full_checkpoint_is_one_file(tiny):
    report = check({"checkpoint": tiny.full, "text_encoder": tiny.of("2.3")["text_encoder"]})
    assert [(entry.role, entry.what) for entry in report.entries] == [
        ("checkpoint", "full checkpoint of LTX-2.3"),
        ("text encoder", "gemma3, 6 layers of width 64"),
    ]
    assert report.require().config.video_vae.latent_channels == tiny_config("2.3")["vae"]["latent_channels"]


# which releases go together -------------------------------------------------------------------------------------------


def version(text):
    return ModelVersion.parse(text)


@pytest.mark.parametrize(
    ("part", "found", "certain", "model", "fits"),
    [
        (VIDEO_VAE, "2.0", True, "2.0", True),
        (VIDEO_VAE, "2.0", True, "2.3", False),
        (VIDEO_VAE, "2.3", True, "2.5", True),
        (VIDEO_VAE, "2.5", True, "2.3", True),
        (VIDEO_VAE, "2.3", False, "2.5", True),
        (VIDEO_VAE, "2.3", False, "2.0", False),
        (AUDIO_VAE, "2.3", True, "2.5", False),
        (AUDIO_VAE, "2.3", False, "2.5", True),  # its layout is that of both
        (AUDIO_VAE, "2.0", False, "2.3", False),
        (PROJECTION, "2.5", True, "2.3", False),
        (UPSAMPLER, "2.3", True, "2.5", True),
        (UPSAMPLER, "2.0", True, "2.5", False),
    ],
)
def test_releases(part, found, certain, model, fits):
    said = misfit(part, Release(version(found), certain), version(model))
    assert (said is None) == fits
    if said is not None:
        assert what_fits(part, version(model)) in said


def test_an_unknown_release_counts_as_fitting():
    assert misfit(VIDEO_VAE, None, version("2.3")) is None


def test_later_releases_share_the_latent_space_of_2_3():
    assert [latent_space(version(v)) for v in ("2.0", "2.3", "2.3.1", "2.5")] == ["2.0", "2.3", "2.3", "2.3"]
