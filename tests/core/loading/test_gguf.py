import io
import json
import os
import random
import struct
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ltx2_engine.kernels.packed import unpack
from ltx2_engine.ltx2_core.loading import gguf as module
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError, read_header, read_tensors
from ltx2_engine.ltx2_core.loading.weights import weights_of
from ltx2_engine.ltx2_core.tiny import checkpoint_file
from safetensors.torch import load_file, save_file

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

Types = gguf.GGMLQuantizationType
PREFIX = "model.diffusion_model."


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def write(path, tensors, architecture="ltxv", values=None, alignment=None):
    """Write a file with the library. tensors: name -> array, or (bytes of the blocks by row, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in (values or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    for name, tensor in tensors.items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, payload):
    return text(name) + struct.pack("<I", kind) + payload


ARCHITECTURE = key("general.architecture", 8, text("ltxv"))


def entry(name="w", sizes=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def raw(keys=(ARCHITECTURE,), tensors=(), data=b"", counts=None, version=3, alignment=32):
    """A file byte for byte."""
    tensor_count, key_count = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def refusal(path, data=None):
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


# what is read --------------------------------------------------------------------------------------------------------


def test_library_and_reader_agree_on_names_shapes_types_and_bytes(path):
    rng = np.random.default_rng(0)
    blocks = {
        kind: rng.integers(0, 256, (6, 2 * gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        for kind in (Types.Q8_0, Types.Q6_K, Types.Q5_K, Types.Q4_K, Types.BF16)
    }
    tensors = {kind.name.lower(): (array, kind) for kind, array in blocks.items()}
    tensors |= {
        "f32": rng.random((3, 5, 2), dtype=np.float32),
        "f16": rng.random((7,)).astype(np.float16),
        "f64": rng.random((2, 2)),
        "i8": np.arange(5, dtype=np.int8),
        "i16": np.arange(5, dtype=np.int16),
        "i32": np.arange(5, dtype=np.int32),
        "i64": np.arange(5, dtype=np.int64),
    }
    values = {
        "config": '{"a": 1}',
        "block_count": 48,
        "eps": 0.5,
        "on": True,
        "tokens": ["a", "\u00e4", ""],
        "n": [1, 2],
    }
    write(path, tensors, values=values)
    header = read_header(path)
    assert dict(header.metadata) == {
        "general.architecture": "ltxv",
        "config": '{"a": 1}',
        "block_count": "48",
        "eps": "0.5",
        "on": "True",
    }
    library = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {PREFIX + name for name in library} == set(header.tensors)
    read = dict(read_tensors(header, header.tensors, device="cpu"))
    for name, tensor in library.items():
        info = header.tensors[PREFIX + name]
        assert info.dtype == tensor.tensor_type.name
        assert info.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (info.begin, info.size_bytes) == (tensor.data_offset, tensor.n_bytes)
        got = read[PREFIX + name]
        assert bytes(got.contiguous().view(torch.uint8).flatten().tolist()) == tensor.data.tobytes()
        if info.dtype in ("Q8_0", "Q6_K", "Q5_K", "Q4_K"):
            assert (got.dtype, got.ndim) == (torch.uint8, 1)
        else:
            assert got.shape == info.shape
    assert header.size_bytes == path.stat().st_size


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_versions_and_alignments(path, alignment, version):
    write(path, {"a": np.ones(3, np.float32), "b": np.arange(9, dtype=np.float32)}, alignment=alignment)
    data = bytearray(path.read_bytes())
    data[4] = version
    path.write_bytes(data)
    header = read_header(path)
    assert all(info.begin % alignment == 0 for info in header.tensors.values())
    assert [t.tolist() for _, t in read_tensors(header, header.tensors, device="cpu")] == [[1.0] * 3, list(range(9))]


def test_tensors_come_in_the_order_of_the_file(path):
    data = np.arange(16, dtype=np.float32).tobytes()
    path.write_bytes(raw(tensors=[entry("b", offset=32), entry("a")], data=data))
    assert list(read_header(path).tensors) == [PREFIX + "a", PREFIX + "b"]


def test_names_with_and_without_the_transformers_prefix(path):
    names = ["patchify_proj.weight", PREFIX + "audio_patchify_proj.weight", "vae.decoder.w", "vocoder.w", "audio_vae.w"]
    names.append("text_embedding_projection.aggregate_embed.weight")
    write(path, {name: np.ones(2, np.float32) for name in names})
    want = [PREFIX + "patchify_proj.weight", *names[1:]]
    assert sorted(read_header(path).tensors) == sorted(want)
    write(path, {"w": np.ones(2, np.float32), PREFIX + "w": np.ones(2, np.float32)})
    assert f"'{PREFIX}w' stands there more than once" in refusal(path)


def test_original_shapes_are_given_back(path):
    values = {"comfy.gguf.orig_shape.w": [2, 3, 4], "comfy.gguf.orig_shape.absent": [7]}
    write(path, {"w": np.arange(24, dtype=np.float32).reshape(6, 4)}, values=values)
    header = read_header(path)
    (tensor,) = dict(read_tensors(header, header.tensors, device="cpu")).values()
    assert torch.equal(tensor, torch.arange(24.0).view(2, 3, 4))
    write(path, {"w": np.zeros((6, 4), np.float32)}, values={"comfy.gguf.orig_shape.w": [5, 5]})
    assert "orig_shape.w is [5, 5], but the tensor is stored as [6, 4]" in refusal(path)
    write(path, {"w": np.zeros((6, 4), np.float32)}, values={"comfy.gguf.orig_shape.w": [-6, -4]})
    assert "orig_shape.w is [-6, -4]" in refusal(path)


def test_strings_too_long_to_be_a_config_are_passed_over(path, monkeypatch):
    write(path, {}, values={"tokenizer.json": "x" * 1_000_001, "config": "{}"})
    assert dict(read_header(path).metadata) == {"general.architecture": "ltxv", "config": "{}"}
    monkeypatch.setattr(module, "_MAX_METADATA_BYTES", 100)
    write(path, {}, values={"a": "x" * 60, "b": "y" * 60})
    assert "more than 100 bytes of metadata" in refusal(path)


GEMMA_LAYER = {
    "attn_norm": ("input_layernorm", (64,)),
    "attn_q": ("self_attn.q_proj", (128, 64)),
    "attn_k": ("self_attn.k_proj", (32, 64)),
    "attn_v": ("self_attn.v_proj", (32, 64)),
    "attn_output": ("self_attn.o_proj", (64, 128)),
    "attn_q_norm": ("self_attn.q_norm", (32,)),
    "attn_k_norm": ("self_attn.k_norm", (32,)),
    "post_attention_norm": ("post_attention_layernorm", (64,)),
    "ffn_norm": ("pre_feedforward_layernorm", (64,)),
    "post_ffw_norm": ("post_feedforward_layernorm", (64,)),
    "ffn_gate": ("mlp.gate_proj", (96, 64)),
    "ffn_up": ("mlp.up_proj", (96, 64)),
    "ffn_down": ("mlp.down_proj", (64, 96)),
}


def test_llama_cpps_names_of_gemma_3_are_those_of_the_library():
    ours = {gguf_name: f"model.layers.{{bid}}.{ours}" for gguf_name, (ours, _) in GEMMA_LAYER.items()}
    tensors = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 3)
    for gguf_name, name in ours.items():
        assert tensors.get_name(name.format(bid=2)) == f"blk.2.{gguf_name}"
    assert tensors.get_name("model.embed_tokens") == "token_embd"
    assert tensors.get_name("model.norm") == "output_norm"


def test_gemma_3_is_presented_under_its_released_names_with_the_norms_marked(path):
    rng = np.random.default_rng(0)
    values = {"token_embd.weight": (50, 64), "output_norm.weight": (64,)}
    values |= {f"blk.{i}.{name}.weight": shape for i in (0, 11) for name, (_, shape) in GEMMA_LAYER.items()}
    write(path, {n: rng.random(s, dtype=np.float32) for n, s in values.items()}, "gemma3", {"gemma3.block_count": 12})
    header = read_header(path)
    assert header.looks_like() == "a Gemma text encoder"
    assert header.metadata["gemma3.block_count"] == "12"
    want = {"model.embed_tokens.weight": (50, 64), "model.norm.weight": (64,)}
    want |= {f"model.layers.{i}.{ours}.weight": shape for i in (0, 11) for ours, shape in GEMMA_LAYER.values()}
    weights = weights_of(header)
    assert {name: weight.shape for name, weight in weights.items()} == want
    shifted = {name for name, weight in weights.items() if weight.offset == -1.0}
    assert shifted == {name for name, shape in want.items() if len(shape) == 1}
    assert all(weight.offset == 0 for name, weight in weights.items() if name not in shifted)


def test_unknown_tensors_of_a_text_encoder_keep_their_names(path):
    write(
        path, {"blk.0.attn_qkv.weight": np.ones(2, np.float32), "rope_freqs.weight": np.ones(2, np.float32)}, "gemma3"
    )
    assert set(read_header(path).tensors) == {"blk.0.attn_qkv.weight", "rope_freqs.weight"}


# a transformer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["2.0", "2.3"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_a_transformers_release_is_told_and_its_values_are_read(path, tiny_models, label, prefixed):
    plain = load_file(tiny_models / "checkpoints" / checkpoint_file(label))
    plain = {name: tensor.float() for name, tensor in plain.items() if name.startswith(PREFIX)}
    tensors = {}
    for name, tensor in plain.items():
        array = np.atleast_1d(tensor.numpy())
        stored = name if prefixed else name.removeprefix(PREFIX)
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "scale_shift_table" not in name:
            array = (gguf.quants.quantize(array, Types.Q8_0), Types.Q8_0)
        tensors[stored] = array
    write(path, tensors, values={"config": json.dumps({"transformer": {}})})
    header = read_header(path)
    assert header.version().label == label
    assert header.looks_like() == f"an LTX-2 checkpoint of version {label}"
    assert header.shapes == {name: tuple(tensor.shape) for name, tensor in plain.items()}
    assert header.config() == {"transformer": {}}
    weights = weights_of(header)
    packed = [weight for weight in weights.values() if weight.format == "q8_0"]
    assert len(packed) > 50
    assert weights[PREFIX + "scale_shift_table"].format == "plain"
    raw_tensors = dict(read_tensors(header, header.tensors, device="cpu"))
    for weight in packed:
        got = unpack(weight.format, {"data": raw_tensors[weight.name]}, weight.shape, torch.float32)
        assert (got - plain[weight.name]).abs().max() <= plain[weight.name].abs().max() / 200


# what is refused -----------------------------------------------------------------------------------------------------

READ = "use a file with F32, BF16, F16, Q8_0, Q6_K, Q5_K and Q4_K only"
OTHERS = sorted(kind for kind in Types if kind.name not in READ and kind.name not in ("F64", "I8", "I16", "I32", "I64"))


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.name)
def test_types_that_are_not_read_are_refused_by_name(path, kind):
    message = refusal(path, raw(tensors=[entry("w", (256,), kind)], data=bytes(4096)))
    assert f"tensor 'w' is stored as {kind.name}: {READ}" in message


def test_types_of_the_reader_are_those_of_the_library():
    for table in (module._PLAIN_TYPES, module._BLOCK_TYPES, module._OTHER_TYPES):
        assert all(Types(number).name == name for number, name in table.items())
    for name, size in module._ITEM_BYTES.items():
        assert gguf.GGML_QUANT_SIZES[Types[name]] == (1, size)


U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
LIES = {
    "would list 200000 tensors": raw(counts=(200_000, 1)),
    "would list 1099511627776 tensors": raw(counts=(2**40, 1)),
    "would list 18446744073709551615 keys": raw(counts=(0, 2**64 - 1)),
    "GGUF of version 1": raw(version=1),
    "GGUF of version 4": raw(version=4),
    "big-endian": raw(version=3 << 24),
    "the name of a metadata key would have 4611686018427387904 bytes": raw(keys=[U64(2**62) + bytes(8)]),
    "the name of a metadata key is not valid UTF-8": raw(keys=[ARCHITECTURE, key(b"\xff\xfe", 0, b"\x01")]),
    "metadata 'a' is not valid UTF-8": raw(keys=[ARCHITECTURE, key("a", 8, text(b"\xff"))]),
    "metadata 'a' would end at byte": raw(keys=[ARCHITECTURE, key("a", 8, U64(2**63))]),
    "metadata 'b' would end at byte": raw(keys=[key("b", 9, U32(0) + U64(2**40))]),
    "metadata 'c' would list 1099511627776 strings": raw(keys=[key("c", 9, U32(8) + U64(2**40))]),
    "array of type 9": raw(keys=[key("c", 9, U32(9) + U64(1))]),
    "metadata 'a' is of type 13": raw(keys=[ARCHITECTURE, key("a", 13, b"")]),
    "metadata 'general.architecture' stands there more than once": raw(keys=[ARCHITECTURE, ARCHITECTURE]),
    "general.alignment is 12": raw(keys=[ARCHITECTURE, key("general.alignment", 4, U32(12))]),
    "general.alignment is 0": raw(keys=[ARCHITECTURE, key("general.alignment", 4, U32(0))]),
    "general.alignment is 2147483648": raw(keys=[ARCHITECTURE, key("general.alignment", 4, U32(2**31))]),
    "general.alignment is '32'": raw(keys=[ARCHITECTURE, key("general.alignment", 8, text("32"))]),
    "general.alignment is True": raw(keys=[ARCHITECTURE, key("general.alignment", 7, b"\x01")]),
    "general.alignment is None": raw(keys=[ARCHITECTURE, key("general.alignment", 9, U32(0) + U64(0))]),
    "is not a shape": raw(keys=[ARCHITECTURE, key("comfy.gguf.orig_shape.w", 9, U32(4) + U64(17) + bytes(68))]),
    "has no general.architecture": raw(keys=[]),
    "is a model of kind 'flux'": raw(keys=[key("general.architecture", 8, text("flux"))]),
    "tensor 'w' has 5 dimensions": raw(tensors=[entry("w", (1, 1, 1, 1, 1))]),
    "tensor 'w' of shape [0, 4611686018427387904] has more than": raw(tensors=[entry("w", (2**62, 0))]),
    "tensor 'w' stands there more than once": raw(tensors=[entry(), entry(offset=32)], data=bytes(64)),
    "stored as type 99, which is not known": raw(tensors=[entry(kind=99)], data=bytes(64)),
    "stored as type 4, which is not known": raw(tensors=[entry(kind=4)], data=bytes(64)),
    "begins at offset 8, which is no multiple of 32": raw(tensors=[entry(offset=8)], data=bytes(64)),
    "but tensor 'w' would end at byte": raw(tensors=[entry()], data=bytes(15)),
    "bytes, but tensor 'w' would end": raw(tensors=[entry(offset=2**63)], data=bytes(64)),
    "inside 'model.diffusion_model.v'": raw(tensors=[entry("v", (16,)), entry("w", offset=32)], data=bytes(64)),
    "of shape [2, 48] is no whole number of Q8_0 blocks of 32 a row": raw(tensors=[entry("w", (48, 2), 8)]),
    "of shape [] is no whole number of Q4_K blocks of 256": raw(tensors=[entry("w", (), 12)]),
}


@pytest.mark.parametrize("phrase", LIES)
def test_headers_that_lie_are_refused(path, phrase):
    assert phrase in refusal(path, LIES[phrase])


def test_every_truncated_file_is_refused(path):
    write(path, {"a": np.ones((2, 32), np.float32), "b": np.ones(8, np.float32)}, values={"s": "xyz", "n": ["a", "b"]})
    whole = path.read_bytes()
    last = max(info.end for info in read_header(path).tensors.values())
    for length in range(last):
        message = refusal(path, whole[:length])
        assert any(phrase in message for phrase in ("download", "damaged", "no GGUF")), message
    for length in range(last, len(whole) + 1):
        path.write_bytes(whole[:length])
        assert len(read_header(path).tensors) == 2


def test_a_file_that_is_cut_short_later_is_an_error_too(path):
    write(path, {"a": np.ones((2, 32), np.float32)})
    header = read_header(path)
    os.truncate(path, header.size_bytes - 64)
    with pytest.raises(CheckpointError, match="changed after its header was read"):
        list(read_tensors(header, header.tensors, device="cpu"))


def test_limits_of_counts_and_of_the_header(path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_TENSORS", 2)
    monkeypatch.setattr(module, "_MAX_KEYS", 2)
    monkeypatch.setattr(module, "_MAX_LISTED_STRINGS", 2)
    ones = np.ones(1, np.float32)
    write(path, dict.fromkeys("abc", ones))
    assert "would list 3 tensors" in refusal(path)
    write(path, {}, values={"a": "b", "c": "d"})
    assert "would list 3 keys" in refusal(path)
    write(path, {}, values={"a": ["x", "y", "z"]})
    assert "metadata 'a' would list 3 strings" in refusal(path)
    monkeypatch.setattr(module, "_MAX_HEADER_BYTES", 60)
    write(path, {}, values={"a": "b" * 50})
    assert "the header has more than 60 bytes" in refusal(path)


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 100)
    return buffer.getvalue()


DISGUISES = {
    "PyTorch pickle": zipped(),
    "PyTorch pickle (.ckpt/.pt) with another name": b"\x80\x02}q\x00X\x05\x00\x00\x00model",
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "web page": b"<!DOCTYPE html><html></html>",
    "a text file": b"Entry not found",
    "it is not a GGUF file": bytes(100),
    "does not begin with GGUF": b"",
}


@pytest.mark.parametrize("phrase", DISGUISES)
def test_other_kinds_of_file_are_called_by_name(path, phrase):
    assert phrase in refusal(path, DISGUISES[phrase])


def test_a_safetensors_file_with_another_name_is_to_be_renamed(path):
    save_file({"w": torch.ones(3)}, path)
    assert "this is a safetensors file with another name; rename it to end in .safetensors" in refusal(path)


def test_a_gguf_file_with_another_name_is_to_be_renamed(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": np.ones(2, np.float32)})
    assert "this is a GGUF file with another name; rename it to end in .gguf" in refusal(path)


# hostile files -------------------------------------------------------------------------------------------------------

VALID = raw(
    keys=[
        ARCHITECTURE,
        key("config", 8, text("{}")),
        key("general.alignment", 4, U32(32)),
        key("tokens", 9, U32(8) + U64(3) + text("a") + text("b") + text("c")),
        key("scores", 9, U32(6) + U64(2) + bytes(8)),
        key("comfy.gguf.orig_shape.w", 9, U32(5) + U64(2) + struct.pack("<2i", 2, 32)),
        key("rate", 12, struct.pack("<d", 0.5)),
    ],
    tensors=[entry("w", (32, 2), 8), entry("v", (4,), 0, 96), entry("u", (256,), 12, 128)],
    data=bytes(272),
)


def read_or_refuse(path):
    message = f"{path}: "
    try:
        return read_header(path)
    except CheckpointError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    return None


def check(path, data, constant_bytes=4_000_000):
    """Only a CheckpointError may come of a file, soon, in little memory; what is accepted must be sound."""
    path.write_bytes(data)
    began = time.monotonic()
    read_or_refuse(path)
    assert time.monotonic() - began < 1
    tracemalloc.start()
    header = read_or_refuse(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(data) + constant_bytes
    if header is not None:
        assert all(0 < info.begin <= info.end <= len(data) for info in header.tensors.values())
        weights = weights_of(header)
        assert {name: weight.shape for name, weight in weights.items()} == header.shapes
        assert isinstance(header.looks_like(), str)
        tensors = dict(read_tensors(header, header.tensors, device="cpu"))
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(data)
        for weight in weights.values():
            if weight.format != "plain":
                assert unpack(weight.format, {"data": tensors[weight.name]}, weight.shape, torch.float32).numel() >= 0
    return header is not None


def test_the_valid_file_of_the_mutations_is_accepted(path):
    assert check(path, VALID)


@given(st.binary(max_size=300))
@example(b"")
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_crash(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    assert not check(path, data) or data.startswith(b"GGUF")
    check(path, b"GGUF" + U32(3) + data)
    check(path, b"GGUF" + U32(3) + U64(1) + U64(1) + ARCHITECTURE + data)


NUMBERS = st.sampled_from([0, 1, 7, 8, 9, 31, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1])


@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6),
    st.lists(st.tuples(st.integers(0, len(VALID) - 8), NUMBERS), max_size=2),
    st.integers(-300, 40),
)
@settings(max_examples=600, deadline=None)
def test_mutated_files_never_crash(tmp_path_factory, changes, numbers, longer):
    data = bytearray(VALID)
    for position, number in numbers:
        data[position : position + 8] = U64(number)
    for position, value in changes:
        data[position] = value
    data = (data + bytes(40))[: len(VALID) + longer]
    check(tmp_path_factory.getbasetemp() / "mutated.gguf", bytes(data))


def test_every_single_byte_may_be_anything(tmp_path):
    path, rng = tmp_path / "byte.gguf", random.Random(0)
    for position in range(len(VALID) - 272):
        for value in (0, 255, VALID[position] ^ 1, rng.randrange(256)):
            data = bytearray(VALID)
            data[position] = value
            check(path, bytes(data))


def test_long_lists_take_little_time_and_memory(path):
    strings = key("tokens", 9, U32(8) + U64(400_000) + text("x") * 400_000)
    assert check(path, raw(keys=[ARCHITECTURE, strings]))
    # a character beyond the first plane makes a string four times as large in memory
    texts = [key(f"k{i}", 8, text("\u00e4" * 400_000 + "\U0001f600")) for i in range(4)]
    assert check(path, raw(keys=[ARCHITECTURE, *texts], tensors=[entry()], data=bytes(16)), 20_000_000)


def test_a_hole_in_a_sparse_file_costs_nothing(path):
    """64 GiB of one tensor, of which no byte is read."""
    head = raw(tensors=[entry("w", (2**36,), 24)])
    path.write_bytes(head)
    try:
        os.truncate(path, len(head) + 2**36)
        assert read_header(path).tensors[PREFIX + "w"].size_bytes == 2**36
    finally:
        path.unlink()


@pytest.mark.skipif(os.environ.get("LTX2_FUZZ") != "1", reason="a minute of fuzzing: set LTX2_FUZZ=1")
def test_a_minute_of_coverage_guided_fuzzing(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed")
    import subprocess

    root = Path(__file__).resolve().parents[3]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(VALID)
    for number, lie in enumerate(LIES.values()):
        (corpus / f"lie{number}").write_bytes(lie)
    script = tmp_path / "fuzz.py"
    script.write_text(FUZZER.format(root=str(root), file=str(tmp_path / "fuzzed.gguf")))
    command = [sys.executable, str(script), str(corpus), "-max_total_time=60", "-timeout=2", "-rss_limit_mb=4096"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    print(result.stderr[-2000:])
    assert result.returncode == 0


FUZZER = """
import pathlib, sys, types
import atheris

package = types.ModuleType("ltx2_engine")
package.__path__ = [{root!r}]
sys.modules["ltx2_engine"] = package
import torch
with atheris.instrument_imports(include=["ltx2_engine.ltx2_core.loading"]):
    from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError, read_header
    from ltx2_engine.ltx2_core.loading import gguf, weights

path = pathlib.Path({file!r})

def one(data):
    path.write_bytes(data)
    try:
        weights.weights_of(read_header(path))
    except CheckpointError:
        pass

atheris.Setup(sys.argv, one)
atheris.Fuzz()
"""
