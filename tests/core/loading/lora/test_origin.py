import pytest
from ltx2_engine.ltx2_core.config.version import ModelVersion
from ltx2_engine.ltx2_core.loading.lora.origin import OLD_2B, OLD_13B, V2_0, V2_3, generation, made_for, other_model

ATTENTION = {f"blocks.{n}.video.attn1.to_{x}": (4096, 4096) for n in range(2) for x in "qkv"}
SMALL = {f"blocks.{n}.video.attn1.to_{x}": (2048, 2048) for n in range(2) for x in "qkv"}
SOUND = {"blocks.0.audio.attn1.to_q": (2048, 2048)}
CROSS = {"blocks.0.video.cross_attn.to_k": (2048, 2048)}
CAPTION = {"video.caption_projection.linear_1": (4096, 3840)}
GATES = {"blocks.0.video.attn1.to_gate_logits": (32, 4096)}
SIX, NINE = ({"video.adaln.linear": (rows * 4096, 4096)} for rows in (6, 9))


@pytest.mark.parametrize(
    ("layers", "stated", "possible"),
    [
        ({}, None, ()),
        ({"video.proj_out": (128, 4096)}, None, ()),
        # attention of the video alone is the same in three models
        (ATTENTION, None, (V2_0, V2_3, OLD_13B)),
        (ATTENTION | SOUND, None, (V2_0, V2_3)),
        (ATTENTION | CROSS, None, (V2_0, V2_3)),
        (ATTENTION | GATES, None, (V2_3,)),
        (ATTENTION | NINE, None, (V2_3,)),
        (ATTENTION | SIX, None, (V2_0, OLD_13B)),
        (ATTENTION | SIX | SOUND, None, (V2_0,)),
        (ATTENTION | CAPTION, None, (V2_0, OLD_13B)),
        ({"blocks.0.video.prompt_scale_shift_table": (2, 4096)}, None, (V2_3,)),
        (SMALL, None, (OLD_2B,)),
        (ATTENTION, "2.0", (V2_0,)),
        (ATTENTION, "2.3.0", (V2_3,)),
        (ATTENTION, "2.5", (V2_3,)),
        (ATTENTION, "0.9.8", (OLD_13B,)),
        # a file may count its own versions
        (ATTENTION | SOUND, "1.0", (V2_0, V2_3)),
        # what contradicts itself tells nothing
        (GATES | CAPTION | SIX, "2.0", ()),
    ],
)
def test_what_the_header_tells(layers, stated, possible):
    version = None if stated is None else ModelVersion.parse(stated)
    assert set(made_for(layers, version)) == set(possible)


@pytest.mark.parametrize(("label", "wanted"), [("2.0", V2_0), ("2.3", V2_3), ("2.5", V2_3)])
def test_models_are_of_their_generation(shapes, label, wanted):
    assert generation(shapes(label)) == wanted


def test_other_modules_are_of_none():
    assert generation(["weight", "video.proj_out.weight"]) is None


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "a Stable Diffusion U-Net"),
        ("diffusion_model.blocks.0.self_attn.q", "Wan"),
        ("lora_unet_blocks_3_cross_attn_k", "Wan"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", "Flux or HunyuanVideo"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "Flux or HunyuanVideo"),
        ("transformer_blocks.0.attn.to_q", "Qwen-Image or another image model"),
        ("anything.else", None),
    ],
)
def test_other_models_are_known_by_their_layers(name, model):
    assert other_model(["x", name]) == model
