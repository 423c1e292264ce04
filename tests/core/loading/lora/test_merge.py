"""LoRAs merged into a whole transformer: arithmetic, names in every form, and what reaches the log."""

import logging
import math

import pytest
import torch
from ltx2_engine.ltx2_core.loading.build import sources_of
from ltx2_engine.ltx2_core.loading.changes import Adapter
from ltx2_engine.ltx2_core.loading.checkpoint import read_header
from ltx2_engine.ltx2_core.loading.keymap import transformer_checkpoint_name
from ltx2_engine.ltx2_core.loading.lora.errors import LoraError
from ltx2_engine.ltx2_core.loading.lora.file import read_lora
from ltx2_engine.ltx2_core.loading.lora.report import match
from ltx2_engine.ltx2_core.loading.lora.strength import Strength
from ltx2_engine.ltx2_core.loading.store import WeightStore, load_component
from ltx2_engine.ltx2_core.testing import assert_close
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from safetensors.torch import load_file

ATTN = "transformer_blocks.1.attn1.to_q"
# one layer of every kind that a prefix or a rename table could get wrong: ours -> checkpoint, diffusers
LAYERS = {
    "blocks.1.video.attn1.to_q": (ATTN, ATTN),
    "blocks.2.audio.attn2.to_out.0": ("transformer_blocks.2.audio_attn2.to_out.0",) * 2,
    "blocks.0.video.cross_attn.to_k": ("transformer_blocks.0.audio_to_video_attn.to_k",) * 2,
    "blocks.0.audio.cross_attn.to_v": ("transformer_blocks.0.video_to_audio_attn.to_v",) * 2,
    "blocks.0.audio.ff.net.0.proj": ("transformer_blocks.0.audio_ff.net.0.proj",) * 2,
    "blocks.0.video.ff.net.2": ("transformer_blocks.0.ff.net.2",) * 2,
    "video.patchify_proj": ("patchify_proj", "proj_in"),
    "audio.patchify_proj": ("audio_patchify_proj", "audio_proj_in"),
    "video.proj_out": ("proj_out", "proj_out"),
    "video.adaln.linear": ("adaln_single.linear", "time_embed.linear"),
    "audio.adaln.emb.timestep_embedder.linear_1": (
        "audio_adaln_single.emb.timestep_embedder.linear_1",
        "audio_time_embed.emb.timestep_embedder.linear_1",
    ),
    "video.prompt_adaln.linear": ("prompt_adaln_single.linear", "prompt_adaln.linear"),
    "audio.prompt_adaln.linear": ("audio_prompt_adaln_single.linear", "audio_prompt_adaln.linear"),
    "video.cross_adaln.linear": (
        "av_ca_video_scale_shift_adaln_single.linear",
        "av_cross_attn_video_scale_shift.linear",
    ),
    "audio.cross_adaln.linear": (
        "av_ca_audio_scale_shift_adaln_single.linear",
        "av_cross_attn_audio_scale_shift.linear",
    ),
    "video.cross_gate_adaln.linear": ("av_ca_a2v_gate_adaln_single.linear", "av_cross_attn_video_a2v_gate.linear"),
    "audio.cross_gate_adaln.linear": ("av_ca_v2a_gate_adaln_single.linear", "av_cross_attn_audio_v2a_gate.linear"),
}
SUFFIXES = [
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A", "lora_B"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora_down", "lora_up"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora.down", "lora.up"),
]
PREFIXES = {
    "trainer": lambda name, _: f"diffusion_model.{name}",
    "merge": lambda name, _: f"model.diffusion_model.{name}",
    "bare": lambda name, _: name,
    "diffusers": lambda _, name: f"transformer.{name}",
    "peft": lambda name, _: f"base_model.model.{name}",
    "peft of a wrapper": lambda name, _: f"base_model.model.diffusion_model.{name}",
    "peft of diffusers": lambda _, name: f"base_model.model.transformer.{name}",
    "kohya": lambda name, _: "lora_unet_" + name.replace(".", "_"),
    "lycoris": lambda name, _: "lycoris_" + name.replace(".", "_"),
}


@pytest.fixture(scope="module")
def factors(shapes):
    """Layer -> (A, B) of rank 3, for every layer of LAYERS."""
    weights = shapes("2.3")
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for name in LAYERS:
        outputs, inputs = weights[name + ".weight"]
        pairs[name] = (torch.randn(3, inputs, generator=generator), torch.randn(outputs, 3, generator=generator))
    return pairs


def named(factors, prefix="trainer", suffixes=SUFFIXES[0], alpha=None):
    tensors = {}
    for ours, (a, b) in factors.items():
        name = PREFIXES[prefix](*LAYERS[ours])
        tensors |= {f"{name}.{suffixes[0]}": a, f"{name}.{suffixes[1]}": b}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def adapter(file, strength):
    return Adapter(file, strength if isinstance(strength, Strength) else Strength.both(strength))


@pytest.fixture(scope="module")
def load(checkpoint, on_meta):
    """A function that reads the tiny transformer of 2.3 with LoRAs, given as (file, strength)."""

    def transformer(*loras, dtype=torch.float32):
        adapters = tuple(adapter(*one) for one in loras)
        file = read_header(checkpoint)
        return load_component(on_meta("2.3"), file, "transformer", device="cpu", dtype=dtype, adapters=adapters)

    return transformer


@pytest.fixture(scope="module")
def report(shapes):
    """A function from LoRAs, given as (file, strength), to what they do to the tiny transformer of 2.3."""

    def make(*loras):
        return match(shapes("2.3"), [(one.file, one.strength) for one in (adapter(*lora) for lora in loras)])

    return make


def same(first, second):
    return all(torch.equal(weight, second.get_parameter(name)) for name, weight in first.named_parameters())


def bf16_ulp(values):
    """Distance of neighbouring bfloat16 numbers (8 bits of precision) at each value."""
    return torch.exp2(values.abs().clamp(min=2.0**-126).log2().floor() - 7)


# arithmetic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_float64_sum_rounded_once(load, report, checkpoint, written, factors, tmp_path, dtype):
    write_tiny_lora(tmp_path / "b.safetensors", checkpoint, rank=5, targets="all", seed=3)
    first = read_lora(written(named(factors, alpha=1.5)))
    second = read_lora(tmp_path / "b.safetensors")
    stored = load_file(second.path)
    loras = (first, 0.8), (second, -1.25)
    found = report(*loras)
    assert [len(one.matched) for one in found.files] == [len(factors), len(stored) // 2]
    base, module = load(dtype=dtype), load(*loras, dtype=dtype)
    for name, weight in module.named_parameters():
        before = base.get_parameter(name)
        want = before.double()
        layer = name.removesuffix(".weight")
        if layer in factors:
            a, b = factors[layer]
            want = want + 0.8 * (1.5 / 3) * (b.double() @ a.double())
        if layer in found.layers and name.endswith(".weight"):
            key = f"diffusion_model.{transformer_checkpoint_name(layer)}"
            want = want - 1.25 * (stored[f"{key}.lora_B.weight"].double() @ stored[f"{key}.lora_A.weight"].double())
            assert not torch.equal(weight, before), name
        if torch.equal(want, before.double()):
            assert torch.equal(weight, before), name
        elif dtype == torch.float32:
            assert_close(name, weight, want, 1e-6)
        else:
            error = (weight.double() - want).abs()
            # half a unit is the rounding itself; float32 sums reach beyond it by their own rounding only
            assert bool((error <= 0.5 * bf16_ulp(want) * (1 + 1e-3) + 1e-6).all()), name
        assert weight.dtype == dtype
        assert not weight.requires_grad


def test_alpha_counts_as_one_when_absent_and_is_logged_when_it_is_not_the_rank(load, report, written, factors, caplog):
    caplog.set_level(logging.INFO, "ltx2.loading")
    plain, equal, double = (
        read_lora(written(named(factors, alpha=alpha), name=f"{alpha}.safetensors")) for alpha in (None, 3, 6)
    )
    results = []
    for file, strength in ((plain, 1.0), (equal, 1.0), (double, 0.5)):
        caplog.clear()
        report((file, strength)).log()
        results.append(load((file, strength)))
        assert ("alpha/rank is 2, not 1, in 17 layers" in caplog.text) == (file is double)
        assert f"(LoRA, rank 3) at strength {strength:g}: 17 layers changed" in caplog.text
    first, *others = results
    assert not same(first, load())
    assert all(same(first, other) for other in others)


def test_strength_zero_matches_but_reads_and_changes_nothing(load, report, checkpoint, on_meta, written, factors):
    one = read_lora(written(named(factors)))
    found = report((one, 0.0))
    assert found.layers == ()
    assert found.size_bytes == 0
    assert len(found.files[0].matched) == len(LAYERS)
    sources = sources_of((read_header(checkpoint),), "transformer")
    store = WeightStore(on_meta("2.3"), sources, device=torch.device("cpu"), dtype=torch.float32)
    store.converge(tuple)
    store.converge(lambda: (adapter(one, 0.0),), on_bytes=pytest.fail)
    assert same(store.module, load())
    counts = []
    store.converge(lambda: (adapter(one, 0.0), adapter(one, 0.5)), on_bytes=counts.append)
    assert sum(counts) == report((one, 0.0), (one, 0.5)).size_bytes
    assert sum(counts) == sum(info.size_bytes for info in one.checkpoint.tensors.values())
    assert same(store.module, load((one, 0.5)))


def test_merging_in_inference_mode_keeps_normal_parameters(load, written, factors):
    file = read_lora(written(named(factors, alpha=2)))
    with torch.inference_mode():
        module = load((file, 1.0))
    assert not any(parameter.is_inference() for parameter in module.parameters())
    assert same(module, load((file, 1.0)))


@pytest.mark.reference
def test_a_file_of_peft_merges_as_in_peft(load, written):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_out.0", "net.2"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(load(), config)
    tensors = {}
    for key, value in peft.get_peft_model_state_dict(model).items():
        layer, factor = key.removeprefix("base_model.model.").split(".lora_")
        name = f"base_model.model.{transformer_checkpoint_name(layer)}"
        tensors |= {f"{name}.lora_{factor}": value, f"{name}.alpha": torch.tensor(10.0)}
    file = read_lora(written({name: tensor.clone() for name, tensor in tensors.items()}))
    module = load((file, 1.0))
    merged = dict(model.merge_and_unload().named_parameters())
    assert len(file.layers) == 3 * (3 * 2 * 2) + 3 * 2
    for name, weight in module.named_parameters():
        assert_close(name, weight, merged[name], 1e-6)


@pytest.mark.reference
def test_bfloat16_weights_agree_with_ltx_core_but_for_its_roundings(load, report, checkpoint, ltx_core, tmp_path):
    from ltx_core.loader import LoraStateDictWithStrength, apply_loras
    from ltx_core.loader.primitives import StateDict

    write_tiny_lora(tmp_path / "a.safetensors", checkpoint, targets="all")
    file = read_lora(tmp_path / "a.safetensors")
    before = {transformer_checkpoint_name(name): value for name, value in load(dtype=torch.bfloat16).named_parameters()}
    stored = {name.removeprefix("diffusion_model."): value for name, value in load_file(file.path).items()}

    def state(tensors):
        return StateDict(tensors, torch.device("cpu"), 0, {torch.bfloat16})

    want = apply_loras(state(before), [LoraStateDictWithStrength(state(stored), 0.7)], torch.bfloat16).sd
    module = load((file, 0.7), dtype=torch.bfloat16)
    different = total = 0
    for layer in report((file, 0.7)).layers:
        key = transformer_checkpoint_name(layer)
        got, theirs = module.get_parameter(layer + ".weight").float(), want[key + ".weight"].float()
        a, b = (stored[f"{key}.lora_{factor}.weight"].double().abs() for factor in "AB")
        # half a bfloat16 unit (2^-8 of the value) for each rounding: theirs of B and of the product, and both sums
        bound = 2.0**-8 * (2 * 0.7 * (b @ a) + 2 * got.abs()) * (1 + 2.0**-6)
        assert bool(((got - theirs).abs() <= bound).all()), layer
        different += int((got != theirs).sum())
        total += got.numel()
    print(f"{100 * different / total:.1f} % of {total} weights differ")
    assert 0 < different / total < 0.35


def test_each_stream_has_its_own_strength(load, written, factors):
    file = read_lora(written(named(factors, alpha=2)))
    weaker = {s: load((file, s)) for s in (0.5, -1.5)}
    module = load((file, Strength(video=0.5, audio=-1.5)))
    for name, value in module.named_parameters():
        stream = "audio" if name.startswith("audio.") or ".audio." in name else "video"
        assert torch.equal(value, weaker[0.5 if stream == "video" else -1.5].get_parameter(name)), name
    # audio-to-video attention writes to the video
    name = "blocks.0.video.cross_attn.to_k.weight"
    assert not torch.equal(weaker[0.5].get_parameter(name), weaker[-1.5].get_parameter(name))


# names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_and_suffix_gives_the_same_bits(load, written, factors, prefix):
    wanted = load((read_lora(written(named(factors, alpha=2))), 0.9))
    for number, ends in enumerate(SUFFIXES):
        file = read_lora(written(named(factors, prefix, ends, alpha=2), name=f"{number}.safetensors"))
        assert set(file.layers) == set(LAYERS)
        assert not file.skipped
        assert same(load((file, 0.9)), wanted), ends


def test_what_is_not_used_is_listed_with_its_reason_and_logged(load, report, written, factors, caplog):
    extra = {
        "diffusion_model.transformer_blocks.40.attn1.to_q.lora_A.weight": torch.ones(3, 128),
        "diffusion_model.transformer_blocks.40.attn1.to_q.lora_B.weight": torch.ones(128, 3),
        "text_embedding_projection.aggregate_embed.lora_A.weight": torch.ones(3, 8),
        "text_embedding_projection.aggregate_embed.lora_B.weight": torch.ones(8, 3),
        "diffusion_model.patchify_proj.bias": torch.ones(128),
    }
    file = read_lora(written(named(factors) | extra))
    [found] = report((file, 1.0)).files
    report((file, 1.0)).log()
    assert dict(found.skipped) == {
        "diffusion_model.transformer_blocks.40.attn1.to_q": "this model has no such layer",
        "text_embedding_projection.aggregate_embed": "a part of the text head: LoRAs are added to the transformer alone",
        "diffusion_model.patchify_proj.bias": "neither a factor nor the alpha of a LoRA",
    }
    assert len(found.matched) == len(LAYERS)
    for name, reason in found.skipped.items():
        assert f"lora.safetensors: 1 skipped, {reason}: {name!r}" in caplog.text
    assert same(load((file, 1.0)), load((read_lora(written(named(factors), name="used.safetensors")), 1.0)))


def test_matching_reads_headers_only(report, written, factors):
    file = read_lora(written(named(factors)))
    file.path.unlink()
    assert set(report((file, 1.0)).layers) == set(LAYERS)


# refusals ------------------------------------------------------------------------------------------------------------


def test_a_lora_of_other_sizes_names_both_shapes(report, written, factors):
    good = read_lora(written(named(factors)))
    bad = {
        f"diffusion_model.{ATTN}.lora_A.weight": torch.ones(3, 64),
        f"diffusion_model.{ATTN}.lora_B.weight": torch.ones(96, 3),
    }
    bad = read_lora(written(named(factors) | bad, name="other.safetensors"))
    with pytest.raises(
        LoraError, match=rf"other.safetensors: .*{ATTN}' changes a weight \[96, 64\], here it is \[128, 128\]"
    ):
        report((good, 1.0), (bad, 1.0))


def test_factors_that_are_not_finite_are_refused(load, written, factors):
    tensors = named(factors)
    tensors[f"diffusion_model.{ATTN}.lora_A.weight"] = torch.full((3, 128), math.nan)
    with pytest.raises(LoraError, match=f"{ATTN}.lora_A.weight' has values that are no numbers"):
        load((read_lora(written(tensors)), 1.0))
