import json
from pathlib import Path

import pytest
from ltx2_engine.ltx2_core.config.released import LABELS, released_config
from ltx2_engine.ltx2_core.config.version import ModelVersion, VersionError, is_lora, layout, looks_like, recognise
from ltx2_engine.ltx2_core.testing import unfold_blocks

DATA = Path(__file__).parents[2] / "data"
PREFIX = "model.diffusion_model."


def data(name):
    return json.loads((DATA / name).read_text())


TRANSFORMER = data("transformer_keys.json")
VIDEO_VAE = data("video_vae_keys.json")
AUDIO = data("audio_keys.json")


def transformer_shapes(label):
    return unfold_blocks(TRANSFORMER[label]["tensors"], 48)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("2.5.0", (2, 5, 0)),
        ("2.4-rc2", (2, 4)),
        ("2.4-2", (2, 4, 2)),
        (" 2.3 ", (2, 3)),
        ("2", (2,)),
        ("2..5", (2,)),
        ("2.\u0663", (2,)),
        ("1" * 5000, None),
        ("v2.3", None),
        ("", None),
    ],
)
def test_version_is_the_leading_whole_numbers(text, numbers):
    assert ModelVersion.parse(text) == (numbers and ModelVersion(numbers))


def test_comparison_pads_with_zeros_and_compares_as_numbers():
    assert ModelVersion((2, 4)).at_least(2, 4, 0)
    assert ModelVersion((2, 4, 0)).at_least(2, 4)
    assert ModelVersion((2, 10)).at_least(2, 9)
    assert ModelVersion((2, 3, 9)).at_least(2, 3)
    assert not ModelVersion((2, 3, 9)).at_least(2, 4)
    assert not ModelVersion((2,)).at_least(2, 0, 1)


def test_label_is_major_and_minor():
    assert [ModelVersion(n).label for n in ((2,), (2, 3), (2, 5, 0))] == ["2.0", "2.3", "2.5"]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("prefix", [PREFIX, ""])
@pytest.mark.parametrize("metadata", [{}, {"model_version": "unknown"}])
def test_released_transformers_are_recognised_by_their_tensors(label, prefix, metadata):
    shapes = {prefix + name.removeprefix(PREFIX): shape for name, shape in transformer_shapes(label).items()}
    assert recognise(metadata, shapes).label == label
    assert looks_like(metadata, shapes) == f"an LTX-2 checkpoint of version {label}"
    assert layout(metadata, shapes) == label


def test_stated_version_wins_over_tensors():
    assert recognise({"model_version": "2.3.0"}, transformer_shapes("2.5")).numbers == (2, 3, 0)


def test_2_5_without_the_keyframe_marker_is_still_2_5():
    shapes = transformer_shapes("2.5")
    del shapes[PREFIX + "keyframes_abs_pos_embedding"]
    assert recognise({}, shapes).label == "2.5"


@pytest.mark.parametrize("rows", [6, 12])
def test_a_mixture_of_releases_is_named_with_its_features(rows):
    shapes = transformer_shapes("2.3") | {PREFIX + "transformer_blocks.0.scale_shift_table": [rows, 4096]}
    with pytest.raises(VersionError, match=rf"table of {rows} rows .*gates present, caption projection absent"):
        recognise({}, shapes)
    assert looks_like({}, shapes) == "an LTX-2 transformer of no released version"


OTHERS = {
    "a LoRA": ["diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight"],
    "LTX-Video 0.9.x": [PREFIX + "adaln_single.linear.weight", PREFIX + "transformer_blocks.0.attn1.to_q.weight"],
    "diffusers names": ["audio_time_embed.linear.weight", "transformer_blocks.0.attn1.to_q.weight"],
    "a Gemma text encoder": ["model.embed_tokens.weight", "text_embedding_projection.aggregate_embed.weight"],
    "a video VAE": ["vae.encoder.conv_in.conv.weight"],
    "an audio VAE": ["audio_vae.encoder.conv_in.conv.weight"],
    "text projections": ["text_embedding_projection.aggregate_embed.weight"],
    "a latent upsampler": ["post_upsample_res_blocks.0.conv1.weight"],
    "an unknown kind of model with tensors such as 'foo'": ["foo"],
    "an empty file": [],
}


@pytest.mark.parametrize("phrase", OTHERS)
def test_other_files_are_refused_by_what_they_look_like(phrase):
    with pytest.raises(VersionError, match="not an LTX-2 checkpoint") as error:
        recognise({}, dict.fromkeys(OTHERS[phrase], (1, 1)))
    assert phrase in str(error.value)


def test_a_stated_version_does_not_make_a_lora_or_an_old_model_an_ltx2_checkpoint():
    with pytest.raises(VersionError, match="a LoRA"):
        recognise({"model_version": "2.3.0"}, dict.fromkeys(OTHERS["a LoRA"], (1, 1)))
    with pytest.raises(VersionError, match=r"LTX-Video 0.9.x .* of LTX 0.9.8"):
        recognise({"model_version": "0.9.8"}, dict.fromkeys(OTHERS["LTX-Video 0.9.x"], (1, 1)))


@pytest.mark.parametrize(("label", "expected"), [("2.0", "2.0"), ("2.3", "2.3"), ("2.5-conv", "2.3")])
@pytest.mark.parametrize("prefix", ["vae.", ""])
def test_video_vae_files_have_a_layout(label, expected, prefix):
    shapes = {prefix + name.removeprefix("vae."): shape for name, shape in VIDEO_VAE[label]["tensors"].items()}
    assert layout({}, shapes) == expected


@pytest.mark.parametrize(("label", "expected"), [("2.0", "2.0"), ("2.3", "2.3"), ("2.5", "2.3")])
def test_audio_files_have_a_layout(label, expected):
    tensors = AUDIO[label]["tensors"]
    assert layout({}, tensors["audio_vae"] | tensors["vocoder"]) == expected


@pytest.mark.parametrize(("name", "expected"), [("aggregate_embed", "2.0"), ("video_aggregate_embed", "2.3")])
def test_text_projections_have_a_layout(name, expected):
    assert layout({}, {f"text_embedding_projection.{name}.weight": (4096, 188160)}) == expected


@pytest.mark.parametrize("end", ["lora_A.weight", "lora_down.weight", "hada_w1_a", "lokr_w1", "diff", "diff_b"])
def test_changes_of_weights_are_no_weights(end):
    assert is_lora([PREFIX + "transformer_blocks.0.attn1.to_q." + end])
    assert not is_lora([PREFIX + "transformer_blocks.0.attn1.to_q.weight"])


def test_files_without_a_known_layout():
    assert layout({}, {"decoder.conv_in_x_t.weight": (1,), **VIDEO_VAE["2.3"]["tensors"]}) is None
    assert layout({}, {"foo": (1,)}) is None


@pytest.mark.parametrize("label", LABELS)
def test_released_config_equals_the_headers_of_the_released_files(label):
    config = released_config(label)
    assert config == {
        "transformer": TRANSFORMER[label]["config"],
        "vae": VIDEO_VAE["2.5-conv" if label == "2.5" else label]["config"],
        "audio_vae": AUDIO[label]["config"]["audio_vae"],
        "vocoder": AUDIO[label]["config"]["vocoder"],
    }
    assert released_config(label) is not config
    config["vae"]["encoder_blocks"][0][1]["num_layers"] = 99
    assert released_config(label)["vae"]["encoder_blocks"][0][1]["num_layers"] == 4


def test_unknown_release_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'2\.1' is known; known are 2\.0, 2\.3, 2\.5"):
        released_config("2.1")
