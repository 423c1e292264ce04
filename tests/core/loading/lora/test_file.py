"""Headers of LoRA files: what is read from them, and what is refused (``file.py`` and ``layer.py``)."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError
from ltx2_engine.ltx2_core.loading.lora.errors import LoraError
from ltx2_engine.ltx2_core.loading.lora.file import read_lora, reference_factors
from ltx2_engine.ltx2_core.loading.write import write_checkpoint

ATTN = "diffusion_model.transformer_blocks.1.attn1.to_q"
OURS = "blocks.1.video.attn1.to_q"
OTHER = "diffusion_model.audio_proj_out"
ones = torch.ones


def pairs(**more):
    """A plain pair for two layers, and more tensors for the first one (None takes one away)."""
    tensors = {
        f"{name}.lora_{f}.weight": ones(3, 8) if f == "A" else ones(6, 3) for name in (ATTN, OTHER) for f in "AB"
    }
    tensors |= {f"{ATTN}.{end.replace('__', '.')}": tensor for end, tensor in more.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def only(**tensors):
    """Tensors of one layer."""
    return {f"{ATTN}.{end.replace('__', '.')}": tensor for end, tensor in tensors.items()}


# what is read --------------------------------------------------------------------------------------------------------


def test_a_plain_file(written):
    file = read_lora(written(pairs(alpha=torch.tensor(6.0)), {"hdr_transform": "x", "other": "y"}))
    assert set(file.layers) == {OURS, "audio.proj_out"}
    layer, other = file.layers[OURS], file.layers["audio.proj_out"]
    assert (layer.name, layer.owner, layer.kind, layer.shape, layer.rank) == (ATTN, OURS, "lora", (6, 8), 3)
    assert {role: info.name for role, info in layer.tensors.items()} == {r: f"{ATTN}.lora_{r}.weight" for r in "AB"}
    assert (layer.alpha, layer.scale) == (6.0, 2.0)
    assert (other.alpha, other.scale) == (None, 1.0)
    assert layer.low_rank
    assert not layer.bias
    assert list(layer.parameters) == [f"{OURS}.weight"]
    assert not file.skipped
    assert file.ranks == (3,)
    assert file.titles == ("LoRA",)
    assert dict(file.hdr) == {"hdr_transform": "x"}


@pytest.mark.parametrize(
    ("tensors", "kind", "title", "shape", "rank"),
    [
        (only(lora_down__weight=ones(2, 8), lora_up__weight=ones(6, 2)), "lora", "LoRA", (6, 8), 2),
        (only(lora_A=ones(2, 8), lora_B=ones(6, 2), dora_scale=ones(6, 1)), "lora", "DoRA", (6, 8), 2),
        (only(lora_A=ones(2, 8), lora_B=ones(6, 2), dora_scale=ones(1, 8)), "lora", "DoRA", (6, 8), 2),
        (only(lora_A=ones(2, 8), lora_B=ones(6, 2), lora_magnitude_vector=ones(6)), "lora", "DoRA", (6, 8), 2),
        (
            only(hada_w1_a=ones(6, 2), hada_w1_b=ones(2, 8), hada_w2_a=ones(6, 2), hada_w2_b=ones(2, 8)),
            "loha",
            "LoHa",
            (6, 8),
            2,
        ),
        (only(lokr_w1=ones(2, 4), lokr_w2=ones(3, 2)), "lokr", "LoKr", (6, 8), None),
        (only(lokr_w1=ones(2, 4), lokr_w2_a=ones(3, 1), lokr_w2_b=ones(1, 2)), "lokr", "LoKr", (6, 8), 1),
        (
            only(lokr_w1=ones(2, 4), lokr_w2=ones(3, 2), dora_scale=ones(6, 1)),
            "lokr",
            "LoKr with DoRA",
            (6, 8),
            None,
        ),
        (only(diff=ones(6, 8)), "full", "full difference", (6, 8), None),
        (only(set_weight=ones(6, 8)), "full", "full difference", (6, 8), None),
        (only(w_norm=ones(6), b_norm=ones(6)), "full", "full difference", (6,), None),
        (only(diff_b=ones(6)), "full", "full difference", None, None),
    ],
)
def test_kinds(written, tensors, kind, title, shape, rank):
    layer = read_lora(written(tensors)).layers[OURS]
    assert (layer.kind, layer.title, layer.shape, layer.rank) == (kind, title, shape, rank)
    assert layer.low_rank == (title == "LoRA")
    assert len(layer.tensors) + len(layer.bias) == len(tensors)


def test_biases_and_tables_are_parameters_of_their_own(written):
    table = "diffusion_model.transformer_blocks.1.scale_shift_table_a2v_ca_audio"
    norm = "diffusion_model.transformer_blocks.1.attn1.q_norm"
    tensors = pairs(lora_B__bias=ones(6)) | {
        f"{table}.diff": ones(5, 4),
        f"{norm}.w_norm": ones(4),
        f"{OTHER}.diff_b": ones(6),
    }
    layers = read_lora(written(tensors)).layers
    assert set(layers[OURS].parameters) == {f"{OURS}.weight", f"{OURS}.bias"}
    assert set(layers["audio.proj_out"].parameters) == {"audio.proj_out.weight", "audio.proj_out.bias"}
    assert set(layers["blocks.1.audio.cross_scale_shift_table"].parameters) == {
        "blocks.1.audio.cross_scale_shift_table"
    }
    assert set(layers["blocks.1.video.attn1.q_norm"].parameters) == {"blocks.1.video.attn1.q_norm.weight"}
    assert layers[OURS].low_rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_alphas_of_any_dtype_and_of_one_element(written, dtype):
    file = read_lora(written(pairs(alpha=torch.tensor([12], dtype=dtype))))
    assert file.layers[OURS].scale == 4.0


def test_a_reshape_is_read(written):
    assert read_lora(written(pairs(reshape_weight=torch.tensor([6, 9])))).layers[OURS].reshape == (6, 9)


def test_no_data_but_the_alphas_is_read(written):
    file = read_lora(written(pairs()))
    file.path.unlink()
    assert file.layers[OURS].scale == 1.0


def test_what_is_of_no_use_is_listed_with_its_reason(written):
    extra = {
        "text_embedding_projection.aggregate_embed.lora_A.weight": ones(3, 8),
        "text_embedding_projection.aggregate_embed.lora_B.weight": ones(8, 3),
        "vae.decoder.conv_in.lora_down.weight": ones(3, 8),
        "vae.decoder.conv_in.lora_mid.weight": ones(3, 3),
        "vae.decoder.conv_in.lora_up.weight": ones(8, 3),
        "diffusion_model.patchify_proj.bias": ones(8),
    }
    file = read_lora(written(pairs() | extra))
    assert set(file.layers) == {OURS, "audio.proj_out"}
    assert dict(file.skipped) == {
        "text_embedding_projection.aggregate_embed": "a part of the text head: LoRAs are added to the transformer alone",
        "vae.decoder.conv_in": "not a part of the LTX-2 transformer",
        "diffusion_model.patchify_proj.bias": "neither a factor nor the alpha of a LoRA",
    }


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "kind"), [("oft_blocks", "OFT"), ("oft_diag", "OFT"), ("boft_blocks", "BOFT")])
def test_algebra_that_is_not_known_is_refused_by_name_even_beside_plain_pairs(written, end, kind):
    path = written(pairs(**{end: ones(3, 3)}))
    with pytest.raises(LoraError, match=r"these can be used: LoRA, LoHa, LoKr, full difference, and DoRA") as error:
        read_lora(path)
    assert str(error.value).startswith(f"{path}: tensor '{ATTN}.{end}' makes this a file of another kind: {kind}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_mid__weight": ones(3, 3)}, "a LoCon with a middle factor is for convolutions"),
        ({"hada_w1_a": ones(3, 3)}, "has tensors of LoRA and LoHa: it must be one of them"),
        ({"lokr_w1": ones(3, 3)}, "has tensors of LoRA and LoKr"),
        ({"diff": ones(3, 3)}, "has tensors of LoRA and full difference"),
        ({"set_weight": ones(3, 3)}, "has tensors of LoRA and full difference"),
        ({"dora_scale": ones(3, 3)}, r"its dora_scale has shape \[3, 3\], the weight \[6, 8\]"),
        ({"lora_magnitude_vector": ones(8)}, r"its magnitude has shape \[8\], the weight \[6, 8\]"),
        ({"dora_scale": ones(6), "lora_magnitude_vector": ones(6)}, "dora_scale and magnitude beside LoRA"),
    ],
)
def test_tensors_that_do_not_go_with_a_pair_are_refused_by_name(written, change, message):
    path = written(pairs(**change))
    with pytest.raises(LoraError, match=message) as error:
        read_lora(path)
    assert ATTN in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("gone", "missing"), [("A", "A"), ("B", "B"), ("AB", "A and B")])
@pytest.mark.parametrize("left", ["alpha", "dora_scale", "lora_B.bias"])
def test_half_pairs_are_named(written, gone, missing, left):
    tensors = pairs() | {f"{ATTN}.{left}": ones(1) if left == "alpha" else ones(6)}
    for factor in gone:
        del tensors[f"{ATTN}.lora_{factor}.weight"]
    with pytest.raises(LoraError, match=rf"{ATTN}': half a pair without factor {missing}: the file is incomplete"):
        read_lora(written(tensors))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (only(hada_w1_a=ones(6, 2), hada_w1_b=ones(2, 8)), "there is no hada_w2_a and no hada_w2_b"),
        (only(lokr_w2=ones(6, 2)), "there is no lokr_w1_a and no lokr_w1_b"),
        (only(diff=ones(6, 8), set_weight=ones(6, 8)), "diff and set_weight are there for one weight"),
        (only(diff=ones(6, 8), dora_scale=ones(6)), "dora_scale beside full difference"),
        (only(reshape_weight=ones(2)), "half a pair"),
    ],
)
def test_incomplete_layers_of_other_kinds(written, tensors, message):
    with pytest.raises(LoraError, match=f"{ATTN}': {message}"):
        read_lora(written(tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_A.weight": ones(4, 8)}, r"A \[4, 8\] and B \[6, 3\]"),
        ({"lora_A.weight": ones(3, 8, 1)}, r"A \[3, 8, 1\] and B \[6, 3\]"),
        ({"lora_A.weight": ones(0, 8), "lora_B.weight": ones(6, 0)}, r"A \[0, 8\]"),
        ({"alpha": ones(2)}, r"alpha' has shape \[2\]: an alpha must be one number"),
        ({"alpha": ones(0)}, r"alpha' has shape \[0\]: an alpha must be one number"),
        ({"alpha": ones(1, dtype=torch.uint8)}, "alpha' is stored as U8"),
        ({"reshape_weight": ones(9)}, r"reshape_weight' has shape \[9\]: a reshape_weight must be at most 8 numbers"),
        ({"lora_B.weight": ones(6, 3, dtype=torch.int8)}, "stored as I8: use a LoRA stored as F64, F32, F16, BF16"),
        ({"lora_B.weight": ones(6, 3).to(torch.float8_e4m3fn)}, "stored as F8_E4M3"),
        ({"lora_B.bias": ones(6, dtype=torch.int8)}, "stored as I8"),
        ({"lora_down.weight": ones(3, 8)}, "are the same factor"),
    ],
)
def test_tensors_that_cannot_be_used_are_refused(written, change, message):
    tensors = pairs() | {f"{ATTN}.{end}": tensor for end, tensor in change.items()}
    with pytest.raises(CheckpointError, match=message):
        read_lora(written(tensors))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_alpha_that_is_no_number_is_refused(written, value):
    with pytest.raises(LoraError, match=f"{ATTN}.alpha' has values that are no numbers"):
        read_lora(written(pairs(alpha=torch.tensor(value))))


def test_the_same_layer_under_two_names_is_refused(written):
    flat = "lora_unet_transformer_blocks_1_attn1_to_q"
    again = {f"{flat}.lora_down.weight": ones(3, 8), f"{flat}.lora_up.weight": ones(6, 3)}
    with pytest.raises(LoraError, match="are the same layer"):
        read_lora(written(pairs() | again))


def test_a_file_of_another_model_says_what_it_looks_like_and_what_would_fit(written, checkpoint):
    other = "lora_unet_down_blocks_0_attentions_0_proj_in"
    path = written({f"{other}.lora_down.weight": ones(4, 8), f"{other}.lora_up.weight": ones(8, 4)})
    with pytest.raises(LoraError, match="it looks like a LoRA of a Stable Diffusion U-Net") as error:
        read_lora(path)
    assert f"names that begin with '{other}.lora_down', '{other}.lora_up'" in str(error.value)
    assert "What fits: a LoRA trained for an LTX-2 transformer" in str(error.value)
    with pytest.raises(LoraError, match=r"it looks like an LTX-2 checkpoint of version 2\.3"):
        read_lora(checkpoint)
    with pytest.raises(LoraError, match="it looks like a LoRA"):
        read_lora(written({"x.lora_A.weight": ones(4, 8), "x.lora_B.weight": ones(8, 4)}))


def test_unsound_headers_are_refused_by_the_checked_reader(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"lora\.safetensors"):
        read_lora(path)
    with pytest.raises(CheckpointError, match=r"lora\.ckpt"):
        read_lora(Path("lora.ckpt"))


_ENDS = ["lora_A.weight", "lora_B.weight", "lora_up.weight", "lora_B.bias", "lora_mid.weight", "alpha", "dora_scale"]
_ENDS += ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"]
_ENDS += ["diff", "diff_b", "set_weight", "w_norm", "b_norm", "reshape_weight", "oft_blocks", "weight", ""]
_NAMES = st.builds("{}.{}".format, st.sampled_from([ATTN, OTHER, "x", ""]), st.sampled_from(_ENDS))
_SHAPES = st.lists(st.sampled_from([0, 1, 2, 3]), max_size=4).map(tuple)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(_NAMES, _SHAPES, max_size=6))
def test_any_header_is_read_or_refused(tmp_path, shapes):
    path = tmp_path / "any.safetensors"
    write_checkpoint(path, {name: torch.ones(shape) for name, shape in shapes.items()}, {})
    with contextlib.suppress(CheckpointError):
        layers = read_lora(path).layers.values()
        assert 0 < sum(len(layer.tensors) + len(layer.bias) for layer in layers) <= len(shapes)
        for layer in layers:
            assert layer.parameters
            assert layer.low_rank == (set(layer.tensors) == {"A", "B"})
            assert layer.kind == "full" or all(layer.shape)


# metadata ------------------------------------------------------------------------------------------------------------

SCALE, TIME = "reference_downscale_factor", "reference_temporal_scale_factor"


def test_reference_factors_default_to_one_and_must_agree(written):
    plain, half, slow, third = (
        read_lora(written(pairs(), metadata, f"{number}.safetensors"))
        for number, metadata in enumerate(({}, {SCALE: "2"}, {SCALE: "2.0", TIME: '"8"'}, {SCALE: "3", TIME: "1"}))
    )
    assert reference_factors([]) == (1, 1)
    assert reference_factors([plain]) == (1, 1)
    assert reference_factors([plain, half]) == (2, 1)
    assert reference_factors([half, slow, plain]) == (2, 8)
    with pytest.raises(LoraError, match=f"{SCALE}: 1.safetensors needs 2, 3.safetensors needs 3"):
        reference_factors([half, plain, third])


@pytest.mark.parametrize("text", ["0", "-2", "1.5", "65", "two", "", "9" * 5000, "٢"])
def test_reference_factors_that_are_no_small_whole_number_are_refused(written, text):
    with pytest.raises(LoraError, match=f"its metadata says {SCALE} = .*: it must be a whole number from 1 to 64"):
        read_lora(written(pairs(), {SCALE: text}))
