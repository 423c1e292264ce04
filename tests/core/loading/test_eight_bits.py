"""Weights that are multiplied in eight bits: what the network holds of each file, how much, and what a layer computes."""

import pytest
import torch
from ltx2_engine.kernels import quantize_rows
from ltx2_engine.kernels.fp8 import pack_fp8
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.numerics import in_eight_bits
from ltx2_engine.ltx2_core.loading.arena import Arena
from ltx2_engine.ltx2_core.loading.build import sources_of
from ltx2_engine.ltx2_core.loading.changes import Adapter
from ltx2_engine.ltx2_core.loading.checkpoint import read_header
from ltx2_engine.ltx2_core.loading.linear import LowRank, PackedLinear, PackedWeight
from ltx2_engine.ltx2_core.loading.lora.file import read_lora
from ltx2_engine.ltx2_core.loading.lora.strength import Strength
from ltx2_engine.ltx2_core.loading.pristine import Touched, choose_policy
from ltx2_engine.ltx2_core.loading.store import WeightStore
from ltx2_engine.ltx2_core.loading.write import write_checkpoint
from ltx2_engine.ltx2_core.networks import build_on_meta
from ltx2_engine.ltx2_core.tiny import tiny_config, write_tiny_checkpoint
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from ltx2_engine.ltx2_core.tiny_packed import write_tiny_packed
from safetensors.torch import load_file
from torch import nn

CPU = torch.device("cpu")
QUERY = "blocks.0.video.attn1.to_q"
STORED = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
PACKED = ("fp8", "fp8_row", "fp8_block", "fp8_e5m2", "fp8_cast", "nvfp4", "mxfp8")
FACTORS = ("fp8", "fp8_row", "fp8_cast")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("eight")
    write_tiny_checkpoint(root / "f32.safetensors", "2.3")
    tensors, metadata = load_file(root / "f32.safetensors"), read_header(root / "f32.safetensors").metadata
    for dtype, name in STORED.items():
        write_checkpoint(
            root / f"{name}.safetensors", {name: tensor.to(dtype) for name, tensor in tensors.items()}, metadata
        )
    for format in PACKED:
        write_tiny_packed(root / f"{format}.safetensors", root / "bf16.safetensors", format)
    write_tiny_lora(root / "lora.safetensors", root / "bf16.safetensors", targets="all", seed=1)
    return root


@pytest.fixture
def store(folder):
    def make(name, policy=None):
        made = WeightStore(
            build_on_meta("transformer", ModelConfig.from_config(tiny_config("2.3"), 7, ())),
            sources_of((read_header(folder / f"{name}.safetensors"),), "transformer"),
            device=CPU,
            dtype=torch.bfloat16,
            keeps_packed=lambda name: name.startswith("blocks."),
            eight_bit=in_eight_bits,
        )
        made.pristine.policy = policy
        return made

    return make


# a layer -------------------------------------------------------------------------------------------------------------


def layer(format="fp8", scale=(48, 1), dtype=torch.float8_e4m3fn, input_scale=None, **options):
    """A linear layer from 32 to 48, and its weight in float64."""
    torch.manual_seed(0)
    weight = torch.randn(48, 32) / 6
    data, factors = pack_fp8(weight, torch.empty(scale), dtype)
    if format == "fp8_cast":
        data, factors = weight.to(dtype), torch.ones(())
    parts = {"data": data} if format == "fp8_cast" else {"data": data, "scale": factors}
    if input_scale is not None:
        parts["input_scale"] = torch.tensor(input_scale)
    bias = nn.Parameter(torch.randn(48).bfloat16(), requires_grad=False)
    made = PackedLinear(None, PackedWeight(format, (48, 32), parts), bias, **options)
    return made, made.packed.unpack(torch.float64)


def formula(x, weight, bias, scale=None):
    """Rows in eight bits times a weight, in float64."""
    rows = x.double()
    scale = rows.abs().amax(-1, keepdim=True) / 448 if scale is None else scale
    # the quotient rounds to float32 before it rounds to eight bits
    codes = (rows / scale).float().clamp(-448, 448).to(torch.float8_e4m3fn).double()
    return codes * scale @ weight.T + bias.double()


@pytest.mark.parametrize(
    ("format", "scale"), [("fp8", ()), ("fp8", (1, 1)), ("fp8", (48,)), ("fp8", (48, 1)), ("fp8_cast", ())]
)
def test_a_layer_follows_the_formula(format, scale):
    linear, weight = layer(format, scale, eight_bit=True)
    x = torch.randn(2, 5, 32).bfloat16()
    got, want = linear(x), formula(x, weight, linear.bias)
    assert got.dtype == torch.bfloat16
    # two roundings, of the product and of the sum
    assert torch.allclose(got.double(), want, rtol=2**-7, atol=2**-7)
    assert linear.reads_rows
    assert torch.equal(linear.of_rows(quantize_rows(x), x.dtype), got)
    plain = layer(format, scale)[0](x)
    assert not torch.equal(plain, got), "it computes in sixteen bits"


def test_a_scale_that_the_file_gives_for_inputs_is_the_one_that_is_taken():
    linear, weight = layer(scale=(), input_scale=0.004, eight_bit=True)
    x = torch.randn(5, 32).bfloat16() * 2
    want = formula(x, weight, linear.bias, torch.tensor(0.004, dtype=torch.float64))
    assert torch.allclose(linear(x).double(), want, rtol=2**-7, atol=2**-7)
    assert (want - formula(x, weight, linear.bias)).abs().max() > 0.1, (
        "nothing saturates: the scale makes no difference"
    )
    assert not linear.reads_rows, "rows that are quantised already have another scale"


@pytest.mark.parametrize(
    "options",
    [{"eight_bit": False}, {"scale": (1, 1), "dtype": torch.float8_e5m2}, {"scale": (1,), "dtype": torch.float8_e5m2}],
)
def test_layers_that_do_not_multiply_in_eight_bits_unpack(options):
    linear, _ = layer(**{"eight_bit": True, **options})
    x = torch.randn(5, 32).bfloat16()
    assert not linear.reads_rows
    assert torch.equal(linear(x), nn.functional.linear(x, linear.packed.unpack(torch.bfloat16), linear.bias))


def test_scales_of_blocks_are_unpacked():
    data, scale = pack_fp8(torch.randn(256, 128), torch.empty(2, 1))
    linear = PackedLinear(None, PackedWeight("fp8", (256, 128), {"data": data, "scale": scale}), None, eight_bit=True)
    x = torch.randn(3, 128).bfloat16()
    assert not linear.in_eight_bits
    assert torch.equal(linear(x), nn.functional.linear(x, linear.packed.unpack(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_inputs_stay_wide(dtype):
    linear, weight = layer(eight_bit=True)
    linear.bias = None
    x = torch.randn(5, 32, dtype=dtype)
    assert torch.allclose(linear(x).double(), x.double() @ weight.T, rtol=1e-5, atol=1e-6)


def test_branches_read_the_plain_input():
    linear, _ = layer(eight_bit=True)
    x = torch.randn(5, 32).bfloat16()
    alone = linear(x)
    branch = LowRank(torch.randn(4, 32).bfloat16(), torch.randn(48, 4).bfloat16(), 0.5)
    branch.strength = 0.7
    linear.branches = nn.ModuleList([branch])
    assert not linear.reads_rows
    assert torch.equal(linear(x), branch(alone, x))


# a network -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORED.values())
def test_plain_weights_are_quantised_as_the_file_has_them(store, folder, name):
    made = store(name)
    blocks = made.module.blocks
    made.give_memory(blocks[0], Arena.of)
    made.give_memory_later(blocks[1], Arena.of)
    full = made.full_bytes()
    made.converge(tuple)
    stored, found = load_file(folder / f"{name}.safetensors"), 0
    for slot in made._slots:
        (info,) = slot.source.weight.parts.values()
        if not in_eight_bits(slot.name):
            assert torch.equal(slot.value()["data"], stored[info.name].bfloat16()), slot.name
            continue
        found += 1
        data, scale = pack_fp8(stored[info.name], torch.empty(slot.source.weight.shape[0], 1))
        value = slot.value()
        assert torch.equal(value["data"].view(torch.uint8), data.view(torch.uint8)), slot.name
        assert torch.equal(value["scale"], scale), slot.name
        assert slot.owner.reads_rows
    # 4 layers in each of 6 attentions, 2 in each of 2 feed-forwards
    assert found == (6 * 4 + 2 * 2) * len(blocks)
    assert made.full_bytes() == full == made.bytes_on(CPU)
    for block in blocks[:2]:
        arena = Arena.of(block)
        start, end = arena.memory.data_ptr(), arena.memory.data_ptr() + arena.size_bytes
        assert all(start <= tensor.data_ptr() < end for tensor in block.state_dict().values())


@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_stay_as_the_file_has_them(store, folder, name):
    made = store(name)
    made.converge(tuple)
    stored = load_file(folder / f"{name}.safetensors")
    for slot in made._slots:
        if in_eight_bits(slot.name):
            assert not slot.quantized
            # a block that is all of a weight is its tensor
            one_block = name == "fp8_block" and slot.value()["scale"].numel() == 1
            assert slot.owner.in_eight_bits == (name in FACTORS or one_block), slot.name
            for role, info in slot.source.weight.parts.items():
                value, want = slot.value()[role], stored[info.name]
                assert value.dtype == want.dtype
                assert torch.equal(value.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))


def test_an_official_file_keeps_its_static_scales(store):
    made = store("fp8")
    made.converge(tuple)
    linear = made.module.get_submodule(QUERY)
    parts = linear.packed.parts
    assert parts["scale"].shape == parts["input_scale"].shape == ()
    assert not linear.reads_rows
    x = torch.randn(3, 128).bfloat16()
    weight = parts["data"].double() * parts["scale"].double()
    want = formula(x, weight, linear.bias, parts["input_scale"].double())
    assert torch.allclose(linear(x).double(), want, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("policy", ["pair", "pinned", "file"])
def test_another_strength_is_computed_from_the_file(store, folder, policy):
    made = store("bf16", policy)
    made.converge(tuple)
    lora = read_lora(folder / "lora.safetensors")
    first, second = ((Adapter(lora, Strength.both(value)),) for value in (1.0, 0.5))
    touched = [slot for slot in made._slots if slot.name in lora_names(lora)]
    quantised = [slot for slot in touched if slot.quantized]
    base_bytes = sum(slot.source.weight.size_bytes for slot in quantised)
    factor_bytes = sum(info.size_bytes for layer in lora.layers.values() for info in layer.tensors.values())
    assert made.expected_bytes(first) == base_bytes + factor_bytes
    made.converge(lambda: first)
    kept = {"pair": base_bytes, "pinned": 0, "file": sum(slot.source.weight.size_bytes for slot in touched)}[policy]
    if policy == "pinned":
        made.keep_in(lambda count: torch.empty(count, dtype=torch.uint8), lambda: False)
    assert made.expected_bytes(second) == kept + factor_bytes


def lora_names(lora):
    return {name for layer in lora.layers.values() for name in layer.parameters}


def test_bytes_that_loras_touch_are_those_of_eight_bits_on_the_device(store, folder):
    made, lora = store("bf16"), read_lora(folder / "lora.safetensors")
    touched = made.touched((Adapter(lora, Strength.both(1.0)),))
    shapes = [slot.source.weight.shape for slot in made._slots if slot.name in lora_names(lora) and slot.quantized]
    assert touched.low_rank
    # a byte less for each weight, four more for the scale of each row
    assert touched.file_bytes - touched.held_bytes == sum(rows * (columns - 4) for rows, columns in shapes)
    gib = 1 << 30
    sizes = Touched(held_bytes=10 * gib, file_bytes=20 * gib, low_rank=True)
    assert choose_policy(sizes, gib, device_free=13 * gib, host_free=0) == "pair"
    assert choose_policy(sizes, gib, device_free=12 * gib, host_free=42 * gib) == "pinned"
    assert choose_policy(sizes, gib, device_free=12 * gib, host_free=41 * gib) == "side"
