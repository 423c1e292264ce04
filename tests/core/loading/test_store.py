"""The weights of a network on their way to a list of LoRAs and back, for every format that files have."""

import pytest
import torch
from ltx2_engine.kernels.packed import REPACKABLE, repack, unpack
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.numerics import in_eight_bits
from ltx2_engine.ltx2_core.host import Interrupted
from ltx2_engine.ltx2_core.loading import store as store_module
from ltx2_engine.ltx2_core.loading.arena import Arena
from ltx2_engine.ltx2_core.loading.build import sources_of
from ltx2_engine.ltx2_core.loading.changes import Adapter
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError, read_header
from ltx2_engine.ltx2_core.loading.linear import PackedLinear
from ltx2_engine.ltx2_core.loading.lora.errors import LoraError
from ltx2_engine.ltx2_core.loading.lora.file import read_lora
from ltx2_engine.ltx2_core.loading.lora.strength import Strength
from ltx2_engine.ltx2_core.loading.slot import quantized
from ltx2_engine.ltx2_core.loading.store import WeightStore
from ltx2_engine.ltx2_core.loading.weights import weights_of
from ltx2_engine.ltx2_core.loading.write import write_checkpoint
from ltx2_engine.ltx2_core.networks import build_on_meta
from ltx2_engine.ltx2_core.tiny import tiny_config, write_tiny_checkpoint
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from ltx2_engine.ltx2_core.tiny_packed import write_tiny_packed
from safetensors.torch import load_file

FILES = ("bf16", "fp8", "fp8_row", "fp8_cast", "nvfp4", "mxfp8")
IN_FP8 = "bf16 in fp8"
FORMATS = (*FILES, IN_FP8)
POLICIES = ("pair", "pinned", "file", "side")
CPU = torch.device("cpu")
QUERY = "blocks.0.video.attn1.to_q"
TABLE = "blocks.0.video.scale_shift_table"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny checkpoints of 2.3 in every format, and LoRAs of several algebras."""
    root = tmp_path_factory.mktemp("store")
    write_tiny_checkpoint(root / "float.safetensors", "2.3")
    halves = {
        name: tensor if "table" in name else tensor.bfloat16()
        for name, tensor in load_file(root / "float.safetensors").items()
    }
    metadata = read_header(root / "float.safetensors").metadata
    write_checkpoint(root / "bf16.safetensors", halves, metadata)
    for format in FILES[1:]:
        write_tiny_packed(root / f"{format}.safetensors", root / "bf16.safetensors", format)
    for number, kind in enumerate(("lora", "bias", "dora", "full", "lokr")):
        write_tiny_lora(root / f"{kind}.safetensors", root / "bf16.safetensors", targets="all", kind=kind, seed=number)
    write_tiny_lora(root / "second.safetensors", root / "bf16.safetensors", rank=2, seed=9, alpha=1.0)
    return root


@pytest.fixture
def store(folder):
    """A function from a format and a policy to a store of the transformer with nothing in it."""

    def make(format="bf16", policy=None, dtype=torch.bfloat16):
        module = build_on_meta("transformer", ModelConfig.from_config(tiny_config("2.3"), 7, ()))
        file = read_header(folder / f"{format.removesuffix(' in fp8')}.safetensors")
        made = WeightStore(
            module,
            sources_of((file,), "transformer"),
            device=CPU,
            dtype=dtype,
            keeps_packed=lambda name: name.startswith("blocks."),
            eight_bit=in_eight_bits if format.endswith(" in fp8") else lambda name: False,
        )
        made.pristine.policy = policy
        return made

    return make


@pytest.fixture
def adapter(folder):
    def make(name="lora", video=1.0, audio=None, parity="float32"):
        strength = Strength(video, video if audio is None else audio)
        return Adapter(read_lora(folder / f"{name}.safetensors"), strength, parity)

    return make


def converge(store, *adapters, **options):
    store.converge(lambda: tuple(adapters), **options)
    return held(store)


def held(store):
    """Every tensor of the network but branches, copied."""
    return {name: t.clone() for name, t in store.module.state_dict().items() if ".branches." not in name}


def same(first, second):
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(bits(tensor), bits(second[name]))
        for name, tensor in first.items()
    )


def only(layer, weights):
    return {name: tensor for name, tensor in weights.items() if name.startswith(layer)}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("format", FILES)
def test_weights_are_those_of_the_file_bit_by_bit(store, folder, format):
    weights = converge(store(format))
    stored = load_file(folder / f"{format}.safetensors")
    for source in store(format)._slots:
        parts = {role: stored[info.name] for role, info in source.source.weight.parts.items()}
        for role, part in parts.items():
            plain = source.source.weight.format == "plain"
            name = source.name if plain else source.name.removesuffix("weight") + f"packed.{role}"
            want = part.bfloat16() if plain else part
            assert torch.equal(bits(weights[name]), bits(want)), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("format", FORMATS)
def test_apply_change_and_remove_gives_the_base_back(store, adapter, format, policy):
    made = store(format, policy)
    base = converge(made)
    first = converge(made, adapter("lora", 0.5), adapter("second"))
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    query = made.module.get_submodule(QUERY)
    changed = query(x)
    again = converge(made, adapter("lora", 0.25), adapter("second"))
    fused = policy != "side" and (format == "bf16" or ("fp8" in format and format != "mxfp8"))
    assert same(*(only(QUERY, weights) for weights in (first, base))) != fused
    assert not torch.equal(changed, query(x)), "the strength changes nothing"
    assert same(*(only(QUERY, weights) for weights in (again, first))) != fused
    assert same(converge(made, adapter("lora", 0.5), adapter("second")), first), "not the same bits as before"
    assert torch.equal(made.module.get_submodule(QUERY)(x), changed)
    assert same(converge(made), base), "the base is not restored"


@pytest.mark.parametrize("format", FORMATS)
def test_overlapped_reading_gives_the_same_bits(store, adapter, format):
    loras = adapter("lora", 0.7), adapter("second", -0.3), adapter("bias", 0.1)
    assert same(converge(store(format), *loras), converge(store(format), *loras, overlap=False))


@pytest.mark.parametrize("format", FORMATS)
def test_merged_weights_follow_the_formula(store, folder, adapter, format):
    made = store(format, "file")
    converge(made, adapter("lora", 0.7), adapter("second", -0.3))
    slot = next(slot for slot in made._slots if slot.name == f"{QUERY}.weight")
    weight = slot.source.weight
    stored = load_file(slot.source.file.path)
    parts = {role: stored[info.name] for role, info in weight.parts.items()}
    base = parts["data"] if weight.format == "plain" else unpack(weight.format, parts, weight.shape, torch.float32)
    prefix = "diffusion_model.transformer_blocks.0.attn1.to_q"
    one, two = load_file(folder / "lora.safetensors"), load_file(folder / "second.safetensors")
    a, b = (one[f"{prefix}.lora_{end}.weight"].double() for end in "AB")
    c, d = (two[f"{prefix}.lora_{end}.weight"].double() for end in "AB")
    total = base.double() + 0.7 * b @ a - 0.3 * 0.5 * d @ c
    if slot.format == "plain":
        got, want = made.module.get_parameter(f"{QUERY}.weight"), total.bfloat16()
        assert (got != want).float().mean() < 1e-3, "more than roundings on the edge"
        assert torch.allclose(got, want, rtol=2**-7)
    elif slot.format in REPACKABLE:
        want = (
            quantized(total.float()) if slot.quantized else repack(slot.format, total.float(), parts, name=weight.name)
        )
        got = made.module.get_submodule(QUERY).packed.parts
        assert got["data"].dtype == want["data"].dtype
        unpacked = [unpack(slot.format, p, weight.shape, torch.float32) for p in (got, want)]
        # a scale that differs in its last bit moves no weight to another step but those on the edge
        assert (~torch.isclose(*unpacked, rtol=1e-5)).float().mean() < 1e-2
    else:
        x = torch.randn(5, 128, dtype=torch.bfloat16)
        linear = made.module.get_submodule(QUERY)
        want = x.double() @ total.T + linear.bias.double()
        assert torch.allclose(linear(x).double(), want, atol=0.05, rtol=0.03)


@pytest.mark.parametrize("format", ["bf16", IN_FP8])
def test_a_list_that_comes_late_or_changes_while_reading_ends_in_the_same_bits(store, adapter, format):
    loras = adapter("lora", 0.7), adapter("second", 0.5)
    want = converge(store(format), *loras)
    for lists in ([(), loras], [loras[:1], loras], [loras, (), loras], [loras[1:], (), loras[:1], loras]):
        made, calls = store(format), iter(range(10**6))
        made.converge(lambda lists=lists, calls=calls: lists[min(next(calls) // 40, len(lists) - 1)])
        assert same(held(made), want), [len(one) for one in lists]


def test_streams_have_strengths_of_their_own(store, adapter):
    base = converge(store())
    video = converge(store(), adapter("lora", 1.0, 0.0))
    changed = {name for name, tensor in video.items() if not torch.equal(tensor, base[name])}
    assert changed
    assert not any(".audio." in name for name in changed)
    assert any(".video.cross_attn." in name for name in changed), "audio-to-video attention writes to the video"


@pytest.mark.parametrize("format", ["bf16", IN_FP8])
def test_a_pair_goes_back_and_forth_without_reading(store, adapter, format, monkeypatch):
    made = store(format, "pair")
    base = converge(made)
    merged = converge(made, adapter())
    assert same(converge(made), base)
    monkeypatch.setattr(read_lora.__globals__["read_header"].__globals__["os"], "preadv", None)
    assert made.expected_bytes((adapter(),)) == 0
    assert same(converge(made, adapter()), merged)
    assert same(converge(made), base)


@pytest.mark.parametrize("format", ["bf16", "fp8", "fp8_cast", IN_FP8])
def test_bases_kept_in_host_memory_are_not_read_again(store, adapter, format, monkeypatch):
    made, pieces = store(format, "pinned"), []
    base = converge(made)
    converge(made, adapter())

    def memory(count):
        pieces.append(torch.empty(count, dtype=torch.uint8))
        return pieces[-1]

    monkeypatch.setattr(store_module, "_PIECE_BYTES", 100_000)
    made.keep_in(memory, lambda: False)
    assert len(pieces) > 3
    files = made.expected_bytes((adapter("lora", 0.5),))
    assert files == sum(info.size_bytes for one in adapter().file.layers.values() for info in one.tensors.values())
    assert made.expected_bytes(()) == 0
    assert same(converge(made), base)
    assert same(converge(made, adapter("lora", 0.5)), converge(store(format), adapter("lora", 0.5)))


def test_forgetting_the_way_back_reads_the_base_again(store, adapter):
    made = store("bf16", "pair")
    base = converge(made)
    converge(made, adapter())
    both = made.bytes_on(CPU)
    made.forget()
    assert made.bytes_on(CPU) < both
    assert same(converge(made), base)


def test_other_algebras_on_packed_weights_make_them_plain_until_they_are_removed(store, adapter):
    made = store("nvfp4", "file")
    base = converge(made)
    converge(made, adapter("dora"))
    linear = made.module.get_submodule(QUERY)
    assert isinstance(linear, PackedLinear)
    assert linear.packed is None
    assert linear.weight.dtype == torch.bfloat16
    assert same(converge(made), base)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("format", FORMATS)
def test_lists_in_any_order_give_the_same_bits_each_time(store, adapter, format, policy):
    """Merged weights and branches take turns: what is kept of one is there, complete, when its list comes back."""
    made, seen = store(format, policy), {}
    low, other = adapter("lora", 0.5), adapter("dora")
    lists = [(), (low,), (other,), (low, other), (adapter("lora", 0.25),)]
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    for number in (0, 1, 2, 1, 3, 4, 2, 4, 0, 3, 1):
        weights = converge(made, *lists[number])
        y = made.module.get_submodule(QUERY)(x)
        before_weights, before_y = seen.setdefault(number, (weights, y))
        assert same(weights, before_weights), number
        assert torch.equal(y, before_y), number


@pytest.mark.parametrize("kind", ["bias", "dora", "full", "lokr"])
@pytest.mark.parametrize("format", ["bf16", "fp8", IN_FP8])
def test_every_algebra_comes_off_again(store, adapter, kind, format):
    made = store(format, "file")
    base = converge(made)
    assert not same(converge(made, adapter(kind, 0.6)), base)
    assert same(converge(made), base)


@pytest.mark.parametrize("policy", ["pair", "file"])
@pytest.mark.parametrize("format", FORMATS)
def test_blocks_in_arenas_hold_the_same_bits_in_their_places(store, adapter, format, policy):
    low, half = adapter(), adapter("lora", 0.5)
    want = {one: converge(store(format, "file"), *one) for one in ((), (low,), (half,))}
    made = store(format, policy)
    blocks = made.module.blocks
    made.give_memory(blocks[0], Arena.of)
    made.give_memory_later(blocks[1], Arena.of)
    assert all(tensor.is_meta for tensor in blocks[1].parameters()), "it took memory before it was read"
    for loras in ((), (low,), (half,), (), (low,), ()):
        got = converge(made, *loras)
        assert got.keys() == want[loras].keys()
        assert [name for name in got if not torch.equal(bits(got[name]), bits(want[loras][name]))] == []
        for block in blocks:
            arena = Arena.of(block)
            inside = arena.memory.data_ptr(), arena.memory.data_ptr() + arena.size_bytes
            plain = [tensor for name, tensor in block.state_dict().items() if ".branches." not in name]
            assert all(inside[0] <= tensor.data_ptr() < inside[1] for tensor in plain)
    made.give_memory(blocks[1], lambda block: Arena.of(block, pin=False))
    assert same(held(made), want[()])


@pytest.mark.parametrize("format", ["bf16", IN_FP8])
def test_a_pair_in_arenas_takes_the_memory_of_two(store, adapter, format):
    made = store(format, "pair")
    for block in made.module.blocks:
        made.give_memory(block, Arena.of)
    alone = 0
    for loras in ((), (adapter(),), (adapter("lora", 0.5),), (), (adapter("lora", 0.5),), ()):
        converge(made, *loras)
        alone = alone or made.bytes_on(CPU)
        touched = made.touched((adapter(),)).held_bytes
        assert made.bytes_on(CPU) - alone == (touched if made.pristine._base or made.pristine._merged else 0)
    assert touched > 0
    assert made.pristine._merged


def test_stopping_and_going_on(store, adapter):
    made, polls = store(), iter(range(10**6))
    with pytest.raises(Interrupted):
        made.converge(lambda: (adapter(),), stopped=lambda: next(polls) > 5)
    assert not made.complete
    assert same(converge(made, adapter()), converge(store(), adapter()))


def test_factors_that_are_no_numbers_are_refused_and_leave_the_base(store, folder, tmp_path):
    tensors = load_file(folder / "lora.safetensors")
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    write_checkpoint(tmp_path / "nan.safetensors", tensors, {})
    made = store("bf16", "file")
    base = converge(made)
    bad = Adapter(read_lora(tmp_path / "nan.safetensors"), Strength.both(1.0))
    with pytest.raises(LoraError, match=rf"nan\.safetensors.*{name}"):
        made.converge(lambda: (bad,))
    assert same(converge(made), base)


def test_an_error_in_a_lora_names_it_and_the_next_load_works(store, folder, adapter, tmp_path):
    path = tmp_path / "short.safetensors"
    path.write_bytes((folder / "lora.safetensors").read_bytes())
    short = Adapter(read_lora(path), Strength.both(1.0))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4000)
    made = store()
    with pytest.raises(CheckpointError, match=r"short\.safetensors"):
        made.converge(lambda: (short,))
    assert same(converge(made), converge(store()))


def test_the_reference_arithmetic_differs_and_comes_off_too(store, adapter):
    made = store("bf16", "file")
    base = converge(made)
    exact = converge(made, adapter())
    reference = converge(made, adapter(parity="ltx-core"))
    assert not same(exact, reference)
    assert same(converge(made), base)


def test_progress_counts_every_byte(store, adapter):
    made, counts = store(), []
    expected = made.expected_bytes((adapter(),))
    converge(made, adapter(), on_bytes=counts.append)
    assert sum(counts) == expected
    assert made.expected_bytes((adapter(),)) == 0


def test_packed_weights_outside_of_blocks_are_unpacked(folder, tmp_path):
    tensors = load_file(folder / "bf16.safetensors")
    name = "model.diffusion_model.proj_out.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    path = tmp_path / "cast.safetensors"
    write_checkpoint(path, tensors, read_header(folder / "bf16.safetensors").metadata)
    file = read_header(path)
    assert weights_of(file)[name].format == "fp8_cast"
    module = build_on_meta("transformer", ModelConfig.from_config(tiny_config("2.3"), 7, ()))
    WeightStore(module, sources_of((file,), "transformer"), device=CPU, dtype=torch.bfloat16).converge(tuple)
    assert torch.equal(module.video.proj_out.weight, tensors[name].bfloat16())
