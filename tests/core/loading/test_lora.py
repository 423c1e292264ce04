import logging
import math
from pathlib import Path

import pytest
import torch
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.loading import lora
from ltx2_engine.ltx2_core.loading.build import load_component
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError, read_header
from ltx2_engine.ltx2_core.loading.keymap import transformer_checkpoint_name
from ltx2_engine.ltx2_core.loading.lora import LoraError, fuse, match, read_lora, reference_factors
from ltx2_engine.ltx2_core.loading.write import write_checkpoint
from ltx2_engine.ltx2_core.networks import build_on_meta
from ltx2_engine.ltx2_core.testing import assert_close
from ltx2_engine.ltx2_core.tiny import checkpoint_file, tiny_config
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from safetensors.torch import load_file
from torch import nn

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


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def load(tiny_models):
    """A function that loads the tiny transformer of 2.3 anew."""
    path = tiny_models / "checkpoints" / checkpoint_file("2.3")

    def transformer(dtype=torch.float32):
        return load_component(on_meta("2.3"), read_header(path), "transformer", device="cpu", dtype=dtype)

    transformer.checkpoint = path
    return transformer


def on_meta(label):
    return build_on_meta("transformer", ModelConfig.from_config(tiny_config(label), 7, ()))


@pytest.fixture(scope="module")
def factors():
    """Layer -> (A, B) of rank 3, for every layer of LAYERS."""
    weights = dict(on_meta("2.3").named_parameters())
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for name in LAYERS:
        outputs, inputs = weights[name + ".weight"].shape
        pairs[name] = (torch.randn(3, inputs, generator=generator), torch.randn(outputs, 3, generator=generator))
    return pairs


@pytest.fixture
def written(tmp_path):
    def write(tensors, metadata=None, name="lora.safetensors"):
        write_checkpoint(tmp_path / name, tensors, metadata or {})
        return tmp_path / name

    return write


def named(factors, prefix="trainer", suffixes=SUFFIXES[0], alpha=None):
    tensors = {}
    for ours, (a, b) in factors.items():
        name = PREFIXES[prefix](*LAYERS[ours])
        tensors |= {f"{name}.{suffixes[0]}": a, f"{name}.{suffixes[1]}": b}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def weights_of(module):
    return {name: parameter.clone() for name, parameter in module.named_parameters()}


def bf16_ulp(values):
    """Distance of neighbouring bfloat16 numbers (8 bits of precision) at each value."""
    return torch.exp2(values.abs().clamp(min=2.0**-126).log2().floor() - 7)


# arithmetic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_weights_are_the_float64_sum_rounded_once(load, written, factors, tmp_path, dtype):
    write_tiny_lora(tmp_path / "b.safetensors", load.checkpoint, rank=5, targets="all", seed=3)
    first = read_lora(written(named(factors, alpha=1.5)))
    second = read_lora(tmp_path / "b.safetensors")
    stored = load_file(second.path)
    module = load(dtype)
    before = weights_of(module)
    report = fuse(module, [(first, 0.8), (second, -1.25)], device="cpu")
    assert [len(one.matched) for one in report.files] == [len(factors), len(stored) // 2]
    for name, weight in module.named_parameters():
        want = before[name].double()
        layer = name.removesuffix(".weight")
        if layer in factors:
            a, b = factors[layer]
            want = want + 0.8 * (1.5 / 3) * (b.double() @ a.double())
        if layer in report.layers and name.endswith(".weight"):
            key = f"diffusion_model.{transformer_checkpoint_name(layer)}"
            want = want - 1.25 * (stored[f"{key}.lora_B.weight"].double() @ stored[f"{key}.lora_A.weight"].double())
            assert not torch.equal(weight, before[name]), name
        if torch.equal(want, before[name].double()):
            assert torch.equal(weight, before[name]), name
        elif dtype == torch.float32:
            assert_close(name, weight, want, 1e-6)
        else:
            error = (weight.double() - want).abs()
            # half a unit is the rounding itself; float32 sums reach beyond it by their own rounding only
            assert bool((error <= 0.5 * bf16_ulp(want) * (1 + 1e-3) + 1e-6).all()), name
        assert weight.dtype == dtype
        assert not weight.requires_grad


def test_alpha_counts_as_one_when_absent_and_is_logged_when_it_is_not_the_rank(load, written, factors, caplog):
    caplog.set_level(logging.INFO, "ltx2.loading")
    plain, equal, double = (
        read_lora(written(named(factors, alpha=alpha), name=f"{alpha}.safetensors")) for alpha in (None, 3, 6)
    )
    results = {}
    for file, strength in ((plain, 1.0), (equal, 1.0), (double, 0.5)):
        caplog.clear()
        module = load()
        fuse(module, [(file, strength)], device="cpu")
        results[file.path.name] = weights_of(module)
        assert ("alpha/rank is 2, not 1, in 17 layers" in caplog.text) == (file is double)
        assert f"(rank 3) at strength {strength:g}: 17 layers changed" in caplog.text
    first, *others = results.values()
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_strength_zero_matches_but_reads_and_changes_nothing(load, written, factors):
    one = read_lora(written(named(factors)))
    module = load(torch.bfloat16)
    before = weights_of(module)
    report = fuse(module, [(one, 0.0)], device="cpu", on_bytes=pytest.fail)
    assert report.layers == ()
    assert report.size_bytes == 0
    assert len(report.files[0].matched) == len(LAYERS)
    assert all(torch.equal(before[name], value) for name, value in module.named_parameters())
    counts = []
    report = fuse(module.requires_grad_(True), [(one, 0.0), (one, 0.5)], device="cpu", on_bytes=counts.append)
    assert sum(counts) == report.size_bytes == sum(info.size_bytes for info in one.checkpoint.tensors.values())


def test_fusing_in_inference_mode_keeps_normal_parameters_and_reports_every_byte(load, written, factors):
    file = read_lora(written(named(factors, alpha=2)))
    module, counts = load(), []
    pointers = [parameter.data_ptr() for parameter in module.parameters()]
    with torch.inference_mode():
        report = fuse(module, [(file, 1.0)], device="cpu", on_bytes=counts.append)
    assert sum(counts) == report.size_bytes == 4 * sum(a.numel() + b.numel() + 1 for a, b in factors.values())
    assert not any(parameter.is_inference() for parameter in module.parameters())
    assert pointers == [parameter.data_ptr() for parameter in module.parameters()]


@pytest.mark.reference
def test_a_file_of_peft_fuses_as_peft_merges(load, written):
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
    module = load()
    fuse(module, [(file, 1.0)], device="cpu")
    merged = dict(model.merge_and_unload().named_parameters())
    assert len(file.pairs) == 3 * (3 * 2 * 2) + 3 * 2
    for name, weight in module.named_parameters():
        assert_close(name, weight, merged[name], 1e-6)


@pytest.mark.reference
def test_bfloat16_weights_agree_with_ltx_core_but_for_its_roundings(load, ltx_core, tmp_path):
    from ltx_core.loader import LoraStateDictWithStrength, apply_loras
    from ltx_core.loader.primitives import StateDict

    write_tiny_lora(tmp_path / "a.safetensors", load.checkpoint, targets="all")
    file = read_lora(tmp_path / "a.safetensors")
    module = load(torch.bfloat16)
    before = {transformer_checkpoint_name(name): value for name, value in weights_of(module).items()}
    stored = {name.removeprefix("diffusion_model."): value for name, value in load_file(file.path).items()}

    def state(tensors):
        return StateDict(tensors, torch.device("cpu"), 0, {torch.bfloat16})

    want = apply_loras(state(before), [LoraStateDictWithStrength(state(stored), 0.7)], torch.bfloat16).sd
    report = fuse(module, [(file, 0.7)], device="cpu")
    weights = dict(module.named_parameters())
    different = total = 0
    for layer in report.layers:
        key = transformer_checkpoint_name(layer)
        got, theirs = weights[layer + ".weight"].float(), want[key + ".weight"].float()
        a, b = (stored[f"{key}.lora_{factor}.weight"].double().abs() for factor in "AB")
        # half a bfloat16 unit (2^-8 of the value) for each rounding: theirs of B and of the product, and both sums
        bound = 2.0**-8 * (2 * 0.7 * (b @ a) + 2 * got.abs()) * (1 + 2.0**-6)
        assert bool(((got - theirs).abs() <= bound).all()), layer
        different += int((got != theirs).sum())
        total += got.numel()
    print(f"{100 * different / total:.1f} % of {total} weights differ")
    assert 0 < different / total < 0.35


# names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_and_suffix_gives_the_same_bits(load, written, factors, prefix):
    wanted = load()
    fuse(wanted, [(read_lora(written(named(factors, alpha=2))), 0.9)], device="cpu")
    wanted = weights_of(wanted)
    suffixes = SUFFIXES if prefix in ("trainer", "kohya") else SUFFIXES[:1]
    for number, ends in enumerate(suffixes):
        file = read_lora(written(named(factors, prefix, ends, alpha=2), name=f"{number}.safetensors"))
        assert set(file.pairs) == set(LAYERS)
        assert not file.skipped
        module = load()
        fuse(module, [(file, 0.9)], device="cpu")
        assert all(torch.equal(wanted[name], value) for name, value in module.named_parameters()), ends


@pytest.mark.parametrize("label", ["2.0", "2.3", "2.5"])
def test_underscored_names_of_every_linear_layer_lead_back_to_it(label):
    layers = {name for name, layer in on_meta(label).named_modules() if isinstance(layer, nn.Linear)}
    flat = {"lora_unet_" + transformer_checkpoint_name(name).replace(".", "_"): name for name in layers}
    assert len(flat) == len(layers) > 100
    for name, ours in flat.items():
        assert lora._module_name(name) == ours


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
    assert lora._module_name(name) is None


def test_what_is_not_used_is_listed_with_its_reason_and_logged(load, written, factors, caplog):
    extra = {
        "diffusion_model.transformer_blocks.40.attn1.to_q.lora_A.weight": torch.ones(3, 128),
        "diffusion_model.transformer_blocks.40.attn1.to_q.lora_B.weight": torch.ones(128, 3),
        "text_embedding_projection.aggregate_embed.lora_A.weight": torch.ones(3, 8),
        "text_embedding_projection.aggregate_embed.lora_B.weight": torch.ones(8, 3),
        "diffusion_model.patchify_proj.bias": torch.ones(128),
    }
    file = read_lora(written(named(factors) | extra))
    report = fuse(load(), [(file, 1.0)], device="cpu")
    assert dict(report.files[0].skipped) == {
        "diffusion_model.transformer_blocks.40.attn1.to_q": "this model has no such layer",
        "text_embedding_projection.aggregate_embed": "not a part of the LTX-2 transformer",
        "diffusion_model.patchify_proj.bias": "neither a factor nor the alpha of a LoRA",
    }
    assert len(report.files[0].matched) == len(LAYERS)
    for name, reason in report.files[0].skipped.items():
        assert f"lora.safetensors: 1 skipped, {reason}: {name!r}" in caplog.text


def test_matching_reads_headers_only(written, factors):
    file = read_lora(written(named(factors)))
    file.path.unlink()
    assert set(match(on_meta("2.3"), [(file, 1.0)]).layers) == set(LAYERS)


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("oft_blocks", "OFT"),
        ("lora_mid.weight", "LoCon"),
        ("diff", "full differences"),
        ("diff_b", "full differences"),
        ("set_weight", "full differences"),
        ("lora_B.bias", "LoRA with a bias"),
        ("lora_up.bias", "LoRA with a bias"),
    ],
)
def test_other_algebra_is_refused_by_name_even_beside_plain_pairs(written, factors, end, kind):
    name = f"diffusion_model.{ATTN}.{end}"
    path = written(named(factors) | {name: torch.ones(3, 3)})
    with pytest.raises(LoraError, match="later version") as error:
        read_lora(path)
    assert str(error.value).startswith(f"{path}: tensor {name!r} makes this a file of another kind: {kind}")


@pytest.mark.parametrize(("gone", "missing"), [("lora_A", "A"), ("lora_B", "B"), ("lora_", "A and B")])
def test_half_pairs_are_named(written, factors, gone, missing):
    tensors = named(factors, alpha=1)
    path = written({name: t for name, t in tensors.items() if not name.startswith(f"diffusion_model.{ATTN}.{gone}")})
    with pytest.raises(LoraError, match=rf"half a pair: .*{ATTN}.* without factor {missing}:"):
        read_lora(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_A.weight": torch.ones(4, 128)}, r"A \[4, 128\] and B \[128, 3\]"),
        ({"lora_A.weight": torch.ones(3, 128, 1)}, r"A \[3, 128, 1\] and B \[128, 3\]"),
        ({"lora_A.weight": torch.ones(0, 128), "lora_B.weight": torch.ones(128, 0)}, r"A \[0, 128\]"),
        ({"alpha": torch.ones(2)}, r"alpha' has shape \[2\]: an alpha must be one number"),
        ({"lora_B.weight": torch.ones(128, 3, dtype=torch.int8)}, "stored as I8"),
        ({"lora_B.weight": torch.ones(128, 3).to(torch.float8_e4m3fn)}, "stored as F8_E4M3"),
        ({"lora_down.weight": torch.ones(3, 128)}, "are the same factor"),
    ],
)
def test_factors_that_cannot_be_multiplied_are_refused(written, factors, change, message):
    tensors = named(factors) | {f"diffusion_model.{ATTN}.{end}": tensor for end, tensor in change.items()}
    with pytest.raises(CheckpointError, match=message):
        read_lora(written(tensors))


def test_the_same_layer_under_two_names_is_refused(written, factors):
    again = {name: tensor.clone() for name, tensor in named(factors, "kohya").items()}
    with pytest.raises(LoraError, match="are the same layer"):
        read_lora(written(named(factors) | again))


def test_a_lora_of_other_sizes_names_both_shapes_and_changes_nothing(load, written, factors):
    good = read_lora(written(named(factors)))
    bad = {
        f"diffusion_model.{ATTN}.lora_A.weight": torch.ones(3, 64),
        f"diffusion_model.{ATTN}.lora_B.weight": torch.ones(96, 3),
    }
    bad = read_lora(written(named(factors) | bad, name="other.safetensors"))
    module = load()
    before = weights_of(module)
    with pytest.raises(
        LoraError, match=rf"other.safetensors: .*{ATTN}' changes a weight \[96, 64\], here it is \[128, 128\]"
    ):
        fuse(module, [(good, 1.0), (bad, 1.0)], device="cpu")
    assert all(torch.equal(before[name], value) for name, value in module.named_parameters())


def test_a_file_that_fits_nothing_says_what_it_looks_like_and_what_would_fit(load, written):
    other = "lora_unet_down_blocks_0_attentions_0_proj_in"
    path = written({f"{other}.lora_down.weight": torch.ones(4, 8), f"{other}.lora_up.weight": torch.ones(8, 4)})
    with pytest.raises(LoraError, match="looks like a LoRA") as error:
        read_lora(path)
    assert f"names that begin with '{other}.lora_down', '{other}.lora_up'" in str(error.value)
    assert "What fits: a LoRA trained for an LTX-2 transformer" in str(error.value)
    with pytest.raises(LoraError, match=r"it looks like an LTX-2 checkpoint of version 2\.3"):
        read_lora(load.checkpoint)


def test_a_lora_of_absent_layers_only_is_refused(written):
    name = "diffusion_model.transformer_blocks.40.attn1.to_q"
    file = read_lora(
        written({f"{name}.lora_A.weight": torch.ones(3, 128), f"{name}.lora_B.weight": torch.ones(128, 3)})
    )
    with pytest.raises(LoraError, match=rf"none of its 1 layers is in this model: it changes '{name}'"):
        match(on_meta("2.3"), [(file, 1.0)])


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, 10.01, -11])
def test_strengths_out_of_range_are_refused_with_the_file(written, factors, strength):
    file = read_lora(written(named(factors)))
    with pytest.raises(ValueError, match=r"lora\.safetensors: a LoRA's strength must be a number from -10 to 10"):
        match(on_meta("2.3"), [(file, strength)])


def test_factors_that_are_not_finite_are_refused(load, written, factors):
    tensors = named(factors)
    tensors[f"diffusion_model.{ATTN}.lora_A.weight"] = torch.full((3, 128), math.nan)
    with pytest.raises(LoraError, match=f"{ATTN}.lora_A.weight' has values that are no numbers"):
        fuse(load(), [(read_lora(written(tensors)), 1.0)], device="cpu")


def test_unsound_headers_are_refused_by_the_checked_reader(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"lora\.safetensors"):
        read_lora(path)
    with pytest.raises(CheckpointError, match=r"lora\.ckpt"):
        read_lora(Path("lora.ckpt"))


# metadata ------------------------------------------------------------------------------------------------------------

SCALE, TIME = "reference_downscale_factor", "reference_temporal_scale_factor"


def test_reference_factors_default_to_one_and_must_agree(written, factors):
    tensors = named(factors)
    plain, half, slow, third = (
        read_lora(written(tensors, metadata, f"{number}.safetensors"))
        for number, metadata in enumerate(({}, {SCALE: "2"}, {SCALE: "2.0", TIME: '"8"'}, {SCALE: "3", TIME: "1"}))
    )
    assert reference_factors([]) == (1, 1)
    assert reference_factors([plain]) == (1, 1)
    assert reference_factors([plain, half]) == (2, 1)
    assert reference_factors([half, slow, plain]) == (2, 8)
    with pytest.raises(LoraError, match=f"{SCALE}: 1.safetensors needs 2, 3.safetensors needs 3"):
        reference_factors([half, plain, third])


@pytest.mark.parametrize("text", ["0", "-2", "1.5", "65", "two", "", "9" * 5000, "٢"])
def test_reference_factors_that_are_no_small_whole_number_are_refused(written, factors, text):
    with pytest.raises(LoraError, match=f"its metadata says {SCALE} = .*: it must be a whole number from 1 to 64"):
        read_lora(written(named(factors), {SCALE: text}))


# the tiny LoRA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["2.0", "2.3"])
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_the_tiny_lora_fits_the_tiny_checkpoint(tiny_models, tmp_path, label, targets):
    path = tmp_path / "loras" / "tiny.safetensors"
    write_tiny_lora(path, tiny_models / "checkpoints" / checkpoint_file(label), targets=targets, metadata={SCALE: "2"})
    file = read_lora(path)
    module = on_meta(label)
    report = match(module, [(file, 1.0)])
    linear = {name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    # 3 blocks of 3 attentions with 4 projections in each of two streams
    assert len(report.layers) == (3 * 3 * 4 * 2 if targets == "attention" else len(linear))
    assert set(report.layers) <= linear
    assert not report.files[0].skipped
    assert file.ranks == (4,)
    assert reference_factors([file]) == (2, 1)


def test_the_tiny_lora_refuses_other_targets(load, tmp_path):
    with pytest.raises(ValueError, match="'attention' or 'all'"):
        write_tiny_lora(tmp_path / "a.safetensors", load.checkpoint, targets="ff")
