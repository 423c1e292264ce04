import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ltx2_engine.ltx2_core.loading.keymap import transformer_checkpoint_name
from ltx2_engine.ltx2_core.loading.lora import names

ROLES = {
    "lora_A.weight": "A",
    "lora_A.default.weight": "A",
    "lora_A": "A",
    "lora_down.weight": "A",
    "lora.down.weight": "A",
    "lora.down": "A",
    "lora_B.weight": "B",
    "lora_up.weight": "B",
    "lora.up.weight": "B",
    "lora_B.bias": "B_bias",
    "lora_B.default.bias": "B_bias",
    "lora_up.bias": "B_bias",
    "lora.up.bias": "B_bias",
    "lora_mid.weight": "mid",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "hada_w1_a": "hada_w1_a",
    "hada_t2": "hada_t2",
    "lokr_w2": "lokr_w2",
    "lokr_w2_b": "lokr_w2_b",
    "lokr_t2": "lokr_t2",
    "diff": "diff",
    "diff_b": "diff_b",
    "set_weight": "set_weight",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
    "reshape_weight": "reshape_weight",
    "oft_blocks": "OFT",
    "boft_R": "BOFT",
}


@pytest.mark.parametrize(("suffix", "role"), ROLES.items())
def test_suffixes(suffix, role):
    for layer in ("diffusion_model.transformer_blocks.0.attn1.to_q", "lora_unet_transformer_blocks_0_ff_net_2", "x"):
        assert names.split(f"{layer}.{suffix}") == (layer, role)


@pytest.mark.parametrize(
    "name", ["", "alpha", "a.b.bias", "a.weight", "a.lora_A.other.weight", "a.lora_A.bias", "a.Alpha", "oft_blocks"]
)
def test_other_tensors_are_no_part_of_a_lora(name):
    assert names.split(name) is None


def owners(module):
    """Names of layers and tables that have parameters."""
    return {name.removesuffix(".weight").removesuffix(".bias") for name, _ in module.named_parameters()}


@pytest.mark.parametrize("label", ["2.0", "2.3", "2.5"])
@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_underscored_names_of_every_layer_lead_back_to_it(on_meta, label, prefix):
    layers = owners(on_meta(label))
    flat = {prefix + transformer_checkpoint_name(name).replace(".", "_"): name for name in layers}
    assert len(flat) == len(layers) > 150
    for name, ours in flat.items():
        assert names.module_name(name) == ours


@pytest.mark.parametrize("label", ["2.0", "2.3", "2.5"])
@pytest.mark.parametrize(
    "prefix", ["", "diffusion_model.", "model.diffusion_model.", "base_model.model.diffusion_model."]
)
def test_prefixes_of_every_layer(on_meta, label, prefix):
    for ours in owners(on_meta(label)):
        assert names.module_name(prefix + transformer_checkpoint_name(ours)) == ours


@pytest.mark.parametrize("label", ["2.0", "2.3", "2.5"])
def test_a_layers_parameters_are_named(on_meta, label):
    module = on_meta(label)
    named = {name for layer in owners(module) for name in (names.weight_name(layer), names.bias_name(layer))}
    assert named >= {name for name, _ in module.named_parameters()}


@pytest.mark.reference
@pytest.mark.parametrize("label", ["2.0", "2.3", "2.5"])
@pytest.mark.parametrize("form", ["dotted", "underscored"])
def test_every_parameter_of_diffusers_has_its_one_counterpart(request, diffusers, on_meta, shapes, label, form):
    keys = json.loads((request.path.parents[3] / "data" / "transformer_keys.json").read_text())[label]
    with torch.device("meta"):
        model = diffusers.LTX2VideoTransformer3DModel(**(keys["diffusers_config"] | {"num_layers": 3}))
    found = []
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        table = leaf not in ("weight", "bias")
        owner = name if table else owner
        flat = "lycoris_" + owner.replace(".", "_")
        ours = names.module_name(f"transformer.{owner}" if form == "dotted" else flat)
        assert ours is not None, name
        found.append(ours if table else f"{ours}.{leaf}")
    assert sorted(found) == sorted(shapes(label))


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_transformer_blocks_0_attn1_to",
        "lora_unet_transformer_blocks_x_attn1_to_q",
        "lora_unet_transformer_blocks_٣_attn1_to_q",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "text_embedding_projection.aggregate_embed",
        "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q",
        "",
    ],
)
def test_other_names_are_no_layer_of_the_transformer(name):
    assert names.module_name(name) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text_embedding_projection.aggregate_embed", "text head"),
        ("diffusion_model.video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q", "text head"),
        ("connectors.text_proj_in", "text head"),
        ("transformer.connectors.video_connector.blocks.0.attn.to_q", "text head"),
        ("aggregate_embed", "text head"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", "not a part of the LTX-2 transformer"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "not a part of the LTX-2 transformer"),
    ],
)
def test_why_a_layer_is_not_used(name, reason):
    assert names.module_name(name) is None
    assert reason in names.why_not(name)


@given(
    st.text(max_size=60) | st.lists(st.sampled_from([*ROLES, "transformer", "blocks", "0", "attn1", ""])).map(".".join)
)
def test_any_name_is_split_or_not(name):
    found = names.split(name)
    if found is not None:
        assert name.startswith(found[0] + ".")
        assert names.module_name(found[0]) is None or isinstance(names.module_name(found[0]), str)
