import json
import re
from pathlib import Path

import pytest
from ltx2_engine.ltx2_core.loading.keymap import (
    COMPONENTS,
    checkpoint_name,
    module_name,
    module_names,
    transformer_checkpoint_name,
    transformer_module_name,
)
from ltx2_engine.ltx2_core.testing import unfold_blocks

DATA = Path(__file__).parents[2] / "data"
PREFIX = "model.diffusion_model."


def data(name):
    return json.loads((DATA / name).read_text())


TRANSFORMER = data("transformer_keys.json")
VIDEO_VAE = data("video_vae_keys.json")
AUDIO = data("audio_keys.json")
TEXT = data("text_keys.json")

EXAMPLES = {
    "transformer_blocks.7.audio_attn1.to_q.weight": "blocks.7.audio.attn1.to_q.weight",
    "transformer_blocks.7.attn2.q_norm.weight": "blocks.7.video.attn2.q_norm.weight",
    "transformer_blocks.0.ff.net.0.proj.weight": "blocks.0.video.ff.net.0.proj.weight",
    "transformer_blocks.0.audio_prompt_scale_shift_table": "blocks.0.audio.prompt_scale_shift_table",
    "transformer_blocks.47.scale_shift_table": "blocks.47.video.scale_shift_table",
    "transformer_blocks.1.audio_to_video_attn.to_out.0.bias": "blocks.1.video.cross_attn.to_out.0.bias",
    "transformer_blocks.1.video_to_audio_attn.to_q.weight": "blocks.1.audio.cross_attn.to_q.weight",
    "transformer_blocks.1.scale_shift_table_a2v_ca_video": "blocks.1.video.cross_scale_shift_table",
    "transformer_blocks.1.scale_shift_table_a2v_ca_audio": "blocks.1.audio.cross_scale_shift_table",
    "audio_patchify_proj.bias": "audio.patchify_proj.bias",
    "scale_shift_table": "video.scale_shift_table",
    "keyframes_abs_pos_embedding": "video.keyframes_abs_pos_embedding",
    "adaln_single.emb.timestep_embedder.linear_1.weight": "video.adaln.emb.timestep_embedder.linear_1.weight",
    "audio_prompt_adaln_single.linear.bias": "audio.prompt_adaln.linear.bias",
    "av_ca_video_scale_shift_adaln_single.linear.weight": "video.cross_adaln.linear.weight",
    "av_ca_v2a_gate_adaln_single.linear.weight": "audio.cross_gate_adaln.linear.weight",
    "caption_projection.linear_2.weight": "video.caption_projection.linear_2.weight",
}


def released_names(label):
    """Every tensor name of a release in one list; 2.5 shares all but the transformer with 2.3."""
    shared = "2.0" if label == "2.0" else "2.3"
    return [
        *unfold_blocks(TRANSFORMER[label]["tensors"], 48),
        *VIDEO_VAE[shared]["tensors"],
        *AUDIO[shared]["tensors"]["audio_vae"],
        *AUDIO[shared]["tensors"]["vocoder"],
        *TEXT[shared]["connectors"],
        *TEXT[shared]["feature_extractor"],
    ]


@pytest.mark.parametrize(("name", "ours"), EXAMPLES.items())
def test_transformer_names(name, ours):
    assert module_name("transformer", PREFIX + name) == ours
    assert checkpoint_name("transformer", ours) == PREFIX + name


@pytest.mark.parametrize(("label", "count"), [("2.0", 3510), ("2.3", 4186), ("2.5", 4091)])
def test_transformer_map_is_one_to_one_on_a_whole_release(label, count):
    names = released_names(label)
    ours = module_names("transformer", names)
    assert len(ours) == len(set(ours.values())) == count == TRANSFORMER[label]["n_tensors"]
    assert all(re.match(r"(blocks\.\d+\.)?(video|audio)\.", name) for name in ours.values())
    assert {checkpoint_name("transformer", name) for name in ours.values()} == set(ours)


@pytest.mark.parametrize("label", ["2.0", "2.3", "2.5"])
def test_components_share_out_every_tensor_of_a_release(label):
    names = released_names(label)
    owners = {name: [] for name in names}
    for component in set(COMPONENTS) - {"upsampler"}:
        ours = module_names(component, names)
        assert len(set(ours.values())) == len(ours) > 0
        assert all(checkpoint_name(component, new) == old for old, new in ours.items())
        for name in ours:
            owners[name].append(component)
    for name, found in owners.items():
        assert len(found) == (2 if "per_channel_statistics" in name else 1), (name, found)


def test_maps_work_for_module_names_and_reject_the_unknown():
    assert transformer_module_name("transformer_blocks.3.audio_attn1.to_q") == "blocks.3.audio.attn1.to_q"
    assert transformer_module_name("audio_adaln_single") == "audio.adaln"
    for unknown in ("transformer_blocks", "transformer_blocks.0", "transformer_blocks.0.attn3.to_q", "attn1.to_q", ""):
        assert transformer_module_name(unknown) is None
    for unknown in ("blocks.0.video", "blocks.0.audio_attn1.to_q", "video.adaln_single.linear", "video", "proj_out"):
        assert transformer_checkpoint_name(unknown) is None


def test_unknown_names_under_the_transformer_prefix_stay_visible():
    odd = [PREFIX + "patchify_proj.weight", PREFIX + "video.patchify_proj.weight", PREFIX + "patchify_projection.bias"]
    assert module_names("transformer", odd) == {odd[0]: "video.patchify_proj.weight", odd[1]: odd[1], odd[2]: odd[2]}


def test_names_of_other_components_are_left_out():
    assert module_name("transformer", PREFIX + "video_embeddings_connector.learnable_registers") is None
    assert module_name("transformer", PREFIX + "duration_head.mlp_out.weight") is None
    assert module_name("transformer", "vae.encoder.conv_in.conv.weight") is None
    assert module_name("video_encoder", "audio_vae.encoder.conv_in.conv.weight") is None


def test_text_head_gathers_projection_and_connectors():
    names = {
        "text_embedding_projection.aggregate_embed.weight": "projection.aggregate_embed.weight",
        PREFIX + "video_embeddings_connector.learnable_registers": "connectors.video.learnable_registers",
        PREFIX + "audio_embeddings_connector.learnable_registers": "connectors.audio.learnable_registers",
    }
    assert module_names("text_head", [*names, PREFIX + "proj_out.weight"]) == names


@pytest.mark.parametrize("component", ["video_encoder", "video_decoder"])
def test_video_vae_may_lack_its_prefix(component):
    names = list(VIDEO_VAE["2.3"]["tensors"])
    bare = [name.removeprefix("vae.") for name in names]
    assert list(module_names(component, bare).values()) == list(module_names(component, names).values())


@pytest.mark.parametrize(
    ("component", "prefix"), [("video_encoder", "vae."), ("video_decoder", ""), ("audio_decoder", "audio_vae.")]
)
def test_only_the_two_used_statistics_count(component, prefix):
    start = prefix + "per_channel_statistics."
    names = [start + name for name in ("mean-of-means", "std-of-means", "mean-of-stds", "channel")]
    assert list(module_names(component, names)) == names[:2]


def test_a_module_name_without_checkpoint_name_is_an_error():
    with pytest.raises(ValueError, match=r"'video\.nothing' of the transformer"):
        checkpoint_name("transformer", "video.nothing")
    with pytest.raises(ValueError, match="'registers' of the text_head"):
        checkpoint_name("text_head", "registers")
