import logging
import math

import pytest
import torch
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.config.transformer import TransformerConfig
from ltx2_engine.ltx2_core.loading.lora.errors import LoraError
from ltx2_engine.ltx2_core.loading.lora.file import read_lora
from ltx2_engine.ltx2_core.loading.lora.report import match
from ltx2_engine.ltx2_core.loading.lora.strength import Strength
from ltx2_engine.ltx2_core.transformer.model import Transformer

ONE = Strength(1.0, 1.0)
BLOCK = "diffusion_model.transformer_blocks.0."
GATES = (f"{BLOCK}attn1.to_gate_logits", 4, 128)
CAPTION = ("diffusion_model.caption_projection.linear_1", 128, 64)
AUDIO = (f"{BLOCK}audio_attn1.to_q", 64, 64)
VIDEO = (f"{BLOCK}attn1.to_q", 128, 128)


@pytest.fixture
def lora(written):
    """A function that writes pairs of (layer, out, in) and more tensors, and reads the file."""

    def make(*layers, metadata=None, name="lora.safetensors", rank=3, **more):
        tensors = {}
        for layer, outputs, inputs in layers:
            tensors |= {
                f"{layer}.lora_A.weight": torch.ones(rank, inputs),
                f"{layer}.lora_B.weight": torch.ones(outputs, rank),
            }
        return read_lora(written(tensors | more.get("tensors", {}), metadata, name))

    return make


def test_what_matches_and_what_does_not(lora, shapes):
    absent = (f"{BLOCK.replace('0', '40')}attn1.to_q", 128, 128)
    tensors = {
        f"{BLOCK}ff.net.2.diff_b": torch.ones(128),
        f"{BLOCK}attn1.to_k.diff": torch.ones(128, 128),
        f"{BLOCK}scale_shift_table.diff": torch.ones(9, 128),
        "diffusion_model.patchify_proj.bias": torch.ones(128),
    }
    file = lora(VIDEO, AUDIO, absent, tensors=tensors)
    (one,) = match(shapes("2.5"), [(file, ONE)]).files
    assert set(one.matched) == {
        "blocks.0.video.attn1.to_q",
        "blocks.0.audio.attn1.to_q",
        "blocks.0.video.attn1.to_k",
        "blocks.0.video.scale_shift_table",
    }
    assert set(one.parameters) == {
        "blocks.0.video.attn1.to_q.weight",
        "blocks.0.audio.attn1.to_q.weight",
        "blocks.0.video.attn1.to_k.weight",
        "blocks.0.video.scale_shift_table",
    }
    assert dict(one.skipped) == {
        absent[0]: "this model has no such layer",
        f"{BLOCK}ff.net.2": "this layer has no bias in this model",
        "diffusion_model.patchify_proj.bias": "neither a factor nor the alpha of a LoRA",
    }
    (one,) = match(shapes("2.3"), [(file, ONE)]).files
    assert "blocks.0.video.ff.net.2.bias" in one.parameters


def test_strengths_count_by_stream(lora, shapes):
    cross = (f"{BLOCK}audio_to_video_attn.to_k", 64, 64)
    file = lora(VIDEO, AUDIO, cross)
    report = match(shapes("2.3"), [(file, Strength(0.0, 0.5))])
    assert report.layers == ("blocks.0.audio.attn1.to_q",)
    assert report.parameters == ("blocks.0.audio.attn1.to_q.weight",)
    assert report.size_bytes == 2 * 3 * 64 * 4
    assert len(report.files[0].matched) == 3
    # audio-to-video attention writes to the video
    report = match(shapes("2.3"), [(file, Strength(0.5, 0.0))])
    assert set(report.layers) == {"blocks.0.video.attn1.to_q", "blocks.0.video.cross_attn.to_k"}
    assert match(shapes("2.3"), [(file, Strength(0.0, 0.0))]).size_bytes == 0


def test_layers_of_several_files_are_listed_once_in_their_order(lora, shapes):
    first, second = lora(AUDIO, name="a.safetensors"), lora(VIDEO, AUDIO, name="b.safetensors")
    report = match(shapes("2.3"), [(first, ONE), (second, ONE)])
    assert report.layers == ("blocks.0.audio.attn1.to_q", "blocks.0.video.attn1.to_q")
    assert report.size_bytes == 4 * 3 * 2 * (64 + 64 + 128)


def test_as_text_and_in_the_log(lora, shapes, caplog):
    caplog.set_level(logging.INFO, "ltx2.loading")
    tensors = {f"{BLOCK}attn1.to_q.alpha": torch.tensor(6.0), "diffusion_model.patchify_proj.bias": torch.ones(128)}
    file = lora(VIDEO, AUDIO, tensors=tensors)
    report = match(shapes("2.3"), [(file, Strength(0.7, 0.2))])
    lines = str(report).splitlines()
    assert lines == [
        "lora.safetensors (LoRA, rank 3) at strength 0.7 (audio 0.2): 2 layers changed",
        "lora.safetensors: alpha/rank is 2, not 1, in 1 layers",
        "lora.safetensors: 1 skipped, neither a factor nor the alpha of a LoRA: 'diffusion_model.patchify_proj.bias'",
    ]
    report.log()
    assert [record.getMessage() for record in caplog.records] == lines
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]


def test_matching_reads_no_file(lora, shapes):
    file = lora(VIDEO)
    file.path.unlink()
    assert match(shapes("2.3"), [(file, ONE)]).layers == ("blocks.0.video.attn1.to_q",)


# refusals ------------------------------------------------------------------------------------------------------------


def test_other_sizes_name_both_shapes(lora, shapes):
    file = lora((VIDEO[0], 96, 64), AUDIO, tensors={f"{BLOCK}attn1.to_k.diff_b": torch.ones(5)})
    with pytest.raises(LoraError, match="a LoRA for a model of other sizes") as error:
        match(shapes("2.3"), [(file, ONE)])
    text = str(error.value)
    assert text.startswith(str(file.path))
    assert f"'{VIDEO[0]}' changes a weight [96, 64], here it is [128, 128]" in text
    assert f"'{BLOCK}attn1.to_k' changes a bias [5], here it is [128]" in text
    assert "What fits: a LoRA trained for an LTX-2 transformer" in text


def test_a_reshape_to_another_shape_is_refused(lora, shapes):
    fits = lora(VIDEO, tensors={f"{VIDEO[0]}.reshape_weight": torch.tensor([128, 128])})
    assert match(shapes("2.3"), [(fits, ONE)]).layers
    wider = lora(VIDEO, tensors={f"{VIDEO[0]}.reshape_weight": torch.tensor([128, 256])})
    with pytest.raises(LoraError, match=r"changes a weight \[128, 256\], here it is \[128, 128\]"):
        match(shapes("2.3"), [(wider, ONE)])


def test_a_file_of_absent_layers_only_is_refused(lora, shapes):
    name = "diffusion_model.transformer_blocks.40.attn1.to_q"
    with pytest.raises(LoraError, match=rf"none of its 1 layers is in this model: it changes '{name}'"):
        match(shapes("2.3"), [(lora((name, 128, 128)), ONE)])


@pytest.mark.parametrize(
    ("layer", "metadata", "label", "looks", "model"),
    [
        (CAPTION, {}, "2.3", r"LTX-2\.0 \(19B\)", r"LTX-2\.3 \(22B\) or later"),
        (GATES, {}, "2.0", r"LTX-2\.3 \(22B\) or later", r"LTX-2\.0 \(19B\)"),
        (
            ("diffusion_model.adaln_single.linear", 768, 128),
            {},
            "2.5",
            r"LTX-2\.0 \(19B\)",
            r"LTX-2\.3 \(22B\) or later",
        ),
        (AUDIO, {"model_version": "2.0"}, "2.3", r"LTX-2\.0 \(19B\)", r"LTX-2\.3 \(22B\) or later"),
        (AUDIO, {"model_version": "2.3.0"}, "2.0", r"LTX-2\.3 \(22B\) or later", r"LTX-2\.0 \(19B\)"),
    ],
)
def test_another_version_is_refused_by_name(lora, shapes, layer, metadata, label, looks, model):
    file = lora(layer, VIDEO, AUDIO, metadata=metadata)
    with pytest.raises(LoraError, match=rf"lora\.safetensors: a LoRA for {looks}, this model is {model}\. What fits"):
        match(shapes(label), [(file, ONE)])


@pytest.mark.parametrize("version", ["2.3.0", "2.5", "1.0"])
def test_later_versions_take_each_others_files(lora, shapes, version):
    file = lora(VIDEO, AUDIO, metadata={"model_version": version})
    for label in ("2.3", "2.5"):
        assert match(shapes(label), [(file, ONE)]).layers


def released_shapes(label):
    with torch.device("meta"):
        module = Transformer(TransformerConfig.from_config(released_config(label)))
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(
    ("width", "label", "message"),
    [
        (2048, "2.0", r"a LoRA for LTX-Video 0\.9\.x \(2B\), this model is LTX-2\.0 \(19B\)"),
        (2048, "2.3", r"a LoRA for LTX-Video 0\.9\.x \(2B\), this model is LTX-2\.3 \(22B\) or later"),
        (
            3072,
            "2.3",
            r"other sizes: .* changes a weight \[3072, 3072\], here it is \[4096, 4096\].* looks like a LoRA for",
        ),
    ],
)
def test_full_size_models_refuse_the_files_of_older_ones(lora, width, label, message):
    old = lora(*((f"transformer_blocks.{n}.attn1.to_q", width, width) for n in range(28)), rank=1)
    with pytest.raises(LoraError, match=message):
        match(released_shapes(label), [(old, ONE)])


def test_a_file_of_2_0_for_everything_is_told_from_one_of_2_3_at_full_size(lora):
    sizes = {label: released_shapes(label) for label in ("2.0", "2.3")}
    ada = "diffusion_model.adaln_single.linear"
    for label, other in (("2.0", "2.3"), ("2.3", "2.0")):
        outputs, inputs = sizes[label]["video.adaln.linear.weight"]
        file = lora((f"{BLOCK}attn1.to_q", 4096, 4096), (ada, outputs, inputs), rank=1)
        assert len(match(sizes[label], [(file, ONE)]).layers) == 2
        with pytest.raises(
            LoraError, match=rf"a LoRA for LTX-{label.replace('.', '[.]')}.*, this model is LTX-{other}"
        ):
            match(sizes[other], [(file, ONE)])


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, 10.01, -11])
def test_strengths_out_of_range_are_refused_with_the_file(lora, shapes, strength):
    file = lora(VIDEO)
    for one in (Strength(strength, 1.0), Strength(1.0, strength)):
        with pytest.raises(ValueError, match=r"lora\.safetensors: a LoRA's strength must be a number from -10 to 10"):
            match(shapes("2.3"), [(file, one)])


def test_parity_with_ltx_core_is_for_plain_pairs(lora, shapes):
    plain = lora(VIDEO, name="plain.safetensors")
    other = lora(VIDEO, tensors={f"{AUDIO[0]}.diff": torch.ones(64, 64)}, name="other.safetensors")
    assert match(shapes("2.3"), [(plain, ONE)], parity="ltx-core").layers
    with pytest.raises(LoraError, match=rf"other\.safetensors: ltx-core adds plain pairs .*: '{AUDIO[0]}'\. Use"):
        match(shapes("2.3"), [(plain, ONE), (other, ONE)], parity="ltx-core")
