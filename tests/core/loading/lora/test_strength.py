import math
from pathlib import Path

import pytest
from ltx2_engine.ltx2_core.loading.lora.strength import Strength, check_strength

BOTH = Strength(0.5, 2.0)


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("blocks.0.video.attn1.to_q", "video"),
        ("blocks.47.audio.attn1.to_q.weight", "audio"),
        # cross attention counts with the stream that it writes to, whatever it reads
        ("blocks.3.video.cross_attn.to_k", "video"),
        ("blocks.3.audio.cross_attn.to_v.bias", "audio"),
        ("blocks.3.audio.cross_scale_shift_table", "audio"),
        ("video.cross_gate_adaln.linear", "video"),
        ("audio.cross_adaln.linear", "audio"),
        ("audio.patchify_proj.weight", "audio"),
        ("video.proj_out", "video"),
        ("video.scale_shift_table", "video"),
    ],
)
def test_a_layer_counts_with_the_stream_it_writes_to(name, stream):
    assert BOTH.of(name) == getattr(BOTH, stream)


def test_every_parameter_belongs_to_the_stream_of_its_module(on_meta):
    module = on_meta("2.0")
    halves = [module.video, module.audio, *(half for b in module.blocks for half in (b.video, b.audio))]
    stream = {
        id(p): BOTH.video if i % 2 == 0 else BOTH.audio for i, half in enumerate(halves) for p in half.parameters()
    }
    assert {name: BOTH.of(name) for name, _ in module.named_parameters()} == {
        name: stream[id(p)] for name, p in module.named_parameters()
    }


def test_as_text():
    assert str(Strength.both(0.7)) == "0.7"
    assert str(BOTH) == "0.5 (audio 2)"


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, 10.01, -11])
def test_out_of_range(strength):
    with pytest.raises(ValueError, match=r"lora\.safetensors: a LoRA's strength must be a number from -10 to 10"):
        check_strength(Path("lora.safetensors"), strength)


@pytest.mark.parametrize("strength", [-10, -0.5, 0, 1, 10])
def test_in_range(strength):
    assert check_strength(Path("a"), strength) == strength
