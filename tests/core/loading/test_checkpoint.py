import json
import logging
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.loading import checkpoint as module
from ltx2_engine.ltx2_core.loading import ring
from ltx2_engine.ltx2_core.loading.checkpoint import Checkpoint, CheckpointError, read_header, read_tensors
from ltx2_engine.ltx2_core.testing import unfold_blocks
from safetensors import SafetensorError
from safetensors import safe_open as open_with_library
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parents[2] / "data"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
SHAPES = ((), (0,), (1,), (3, 5), (2, 0, 4), (7, 1, 3, 2))


def random_tensor(dtype, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    count = torch.Size(shape).numel()
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (count * size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


def test_round_trip_with_the_library_keeps_every_bit_of_every_dtype(path):
    tensors = {
        f"{name}.{index}": random_tensor(dtype, shape, seed=index)
        for name, dtype in DTYPES.items()
        for index, shape in enumerate(SHAPES)
    }
    save_file(tensors, path, {"model_version": "2.3.0", "note": "\u00e4"})
    header = read_header(path)
    assert dict(header.metadata) == {"model_version": "2.3.0", "note": "\u00e4"}
    assert header.size_bytes == path.stat().st_size
    got = dict(read_tensors(header, tensors, device="cpu"))
    assert list(got) == list(header.tensors)
    assert set(got) == set(tensors)
    for name, want in tensors.items():
        assert header.tensors[name].dtype == name.split(".")[0]
        assert (got[name].dtype, got[name].shape) == (want.dtype, want.shape)
        assert torch.equal(bits(got[name]), bits(want))


@given(
    st.dictionaries(
        st.text(max_size=8), st.tuples(st.sampled_from(list(DTYPES.values())), st.sampled_from(SHAPES)), max_size=6
    )
)
@settings(max_examples=40, deadline=None)
def test_any_names_survive_the_round_trip(tmp_path_factory, layout):
    layout.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("any") / "a.sft"
    tensors = {name: random_tensor(dtype, shape) for name, (dtype, shape) in layout.items()}
    save_file(tensors, path)
    got = dict(read_tensors(read_header(path), tensors, device="cpu"))
    assert got.keys() == tensors.keys()
    assert all(torch.equal(bits(got[name]), bits(tensors[name])) for name in tensors)


def test_tensors_come_in_file_order_and_only_those_asked_for(path):
    data = struct.pack("<4f", 1, 2, 3, 4)
    write(path, {"b": entry(begin=8, end=16), "a": entry(), "c": entry(shape=(0,), begin=16, end=16)}, data)
    header = read_header(path)
    assert list(header.tensors) == ["a", "b", "c"]
    assert [(n, t.tolist()) for n, t in read_tensors(header, ["b", "a", "b"], device="cpu")] == [
        ("a", [1.0, 2.0]),
        ("b", [3.0, 4.0]),
    ]
    assert [n for n, _ in read_tensors(header, ["c"], device="cpu")] == ["c"]


def test_floating_tensors_are_cast_and_others_are_not(path):
    save_file({n: random_tensor(t, (4,)) for n, t in DTYPES.items() if not n.startswith("F8")}, path)
    header = read_header(path)
    values = load_file(path)
    for name, tensor in read_tensors(header, header.tensors, device="cpu", dtype=torch.bfloat16):
        floating = name in ("F64", "F32", "F16", "BF16")
        want = values[name].to(torch.bfloat16) if floating else values[name]
        assert tensor.dtype == want.dtype
        assert torch.equal(bits(tensor), bits(want))


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_fp8_with_a_dtype_is_refused_before_anything_is_read(path, name):
    save_file({"w": random_tensor(DTYPES[name], (4,))}, path)
    header = read_header(path)
    with pytest.raises(CheckpointError, match=rf"'w' is stored as {name}.*use the bf16 file"):
        read_tensors(header, ["w"], device="cpu", dtype=torch.bfloat16)


def test_unknown_name_is_refused_with_what_the_file_looks_like(path):
    save_file({"model.embed_tokens.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"no tensor 'w'.*Gemma"):
        read_tensors(read_header(path), ["w"], device="cpu")


def test_tensors_read_during_inference_are_normal_tensors(path):
    save_file({"w": torch.ones(3)}, path)
    with torch.inference_mode():
        ((_, tensor),) = read_tensors(read_header(path), ["w"], device="cpu", dtype=torch.bfloat16)
        assert torch.is_inference_mode_enabled()
    assert not tensor.is_inference()


def test_big_tensors_are_read_in_slices_and_an_interrupt_ends_the_reading(path, monkeypatch):
    monkeypatch.setattr(ring, "CHUNK_BYTES", 16)
    save_file({"a": torch.arange(10.0), "b": torch.arange(3.0)}, path)
    header = read_header(path)
    counts = []
    got = dict(read_tensors(header, header.tensors, device="cpu", on_bytes=counts.append))
    assert counts == [16, 16, 16, 4]
    assert torch.equal(got["a"], torch.arange(10.0))

    def interrupt(count):
        seen.append(count)
        if len(seen) == 2:
            raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        list(read_tensors(header, header.tensors, device="cpu", on_bytes=interrupt))
    assert seen == [16, 16]


def test_a_file_replaced_after_its_header_was_read_is_refused(path):
    save_file({"w": torch.ones(3)}, path)
    header = read_header(path)
    os.utime(path, ns=(0, header.mtime_ns + 1))
    assert read_header(path).identity != header.identity
    with pytest.raises(CheckpointError, match="changed after its header was read"):
        list(read_tensors(header, ["w"], device="cpu"))


def test_a_file_cut_short_while_being_read_is_an_error(path, monkeypatch):
    monkeypatch.setattr(ring, "CHUNK_BYTES", 16)
    save_file({"a": torch.ones(10)}, path)
    header = read_header(path)
    read = ring._read_at

    def cut(*place):
        os.truncate(path, header.size_bytes - 24)
        return read(*place)

    monkeypatch.setattr(ring, "_read_at", cut)
    with pytest.raises(CheckpointError, match="the file ends 24 bytes before the end of tensor 'a'"):
        list(read_tensors(header, ["a"], device="cpu"))


def test_a_file_that_vanished_is_an_error_that_names_it(path):
    save_file({"w": torch.ones(3)}, path)
    header = read_header(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: reading failed"):
        list(read_tensors(header, ["w"], device="cpu"))


def test_incomplete_download_says_how_many_bytes_are_missing(path):
    save_file({"w": torch.ones(100)}, path)
    size = path.stat().st_size
    for kept in (size - 1, size - 400, 40):
        os.truncate(path, kept)
        promised = size if kept >= size - 400 else size - 400
        message = refusal(path)
        assert f"the file has {kept} bytes, its header promises {promised}" in message
        assert "the download is incomplete; download it again" in message


HEADERS = {
    "must begin with a brace": b'[{"a": 1}]',
    "begin with a brace": b'  {"a": 1}',
    "not valid JSON": b'{"a": }',
    "'utf-8' codec can't decode": b'{"\xff": 1}',
    "key 'a' stands there 2 times": b'{"a": {}, "a": {}}',
    "key 'dtype' stands there 2 times": b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    "recursion": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "brackets (allowed": b'{"a":' + b"[" * 1_700_000,
    "number NaN is not a whole number": b'{"a": NaN}',
    "a number of 5000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "number 2.0 is not": b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
    "not valid Unicode": b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "metadata 'k' is not valid Unicode": b'{"__metadata__": {"k": "\\ud800"}}',
}


@pytest.mark.parametrize("phrase", HEADERS)
def test_unusable_json_is_refused(path, phrase):
    assert phrase in refusal(write(path, HEADERS[phrase], bytes(8)))


ENTRIES = {
    "__metadata__ is a list": {"__metadata__": []},
    "metadata 'k' is a int, not a string": {"__metadata__": {"k": 1}},
    "metadata 'k' is a dict": {"__metadata__": {"k": {}}},
    "'w': the entry must have dtype, shape and data_offsets": {"w": {"dtype": "F32", "shape": [2]}},
    "and nothing else": {"w": entry() | {"extra": 1}},
    "'w': the entry must": {"w": [1, 2]},
    "dtype 'F4' is not one of F64, F32": {"w": entry(dtype="F4")},
    "dtype ['F32'] is not one": {"w": entry(dtype=["F32"])},
    "shape [-1, -2] is not a list": {"w": entry(shape=(-1, -2))},
    "shape [True, 2] is not a list": {"w": entry(shape=(True, 2))},
    "shape '2' is not a list": {"w": entry() | {"shape": "2"}},
    "at most 16": {"w": entry(shape=(1,) * 17, end=4)},
    f"shape [0, {2**63}] has more than": {"w": entry(shape=(0, 2**63), end=0)},
    "elements": {"w": entry(shape=(2**32, 2**32 + 1))},
    "data_offsets [0, 4, 8] are not two": {"w": entry() | {"data_offsets": [0, 4, 8]}},
    "data_offsets [False, 8] are not": {"w": entry() | {"data_offsets": [False, 8]}},
    "span 4 bytes, but F32 of shape [2] takes 8": {"w": entry(end=4)},
    "span -8 bytes": {"w": entry(begin=8, end=0)},
    "overlaps the tensor before it": {"v": entry(), "w": entry(shape=(1,), begin=4, end=8)},
    "overlaps": {"v": entry(), "w": entry()},
    "leaves a hole before it": {"w": entry(shape=(1,), begin=4, end=8)},
    "bytes, its header describes": {"w": entry(shape=(1,), end=4)},
    "header describes": {},
    "the download is incomplete": {"w": entry(begin=0, end=16, shape=(4,))},
}


@pytest.mark.parametrize("phrase", ENTRIES)
def test_entries_that_lie_are_refused(path, phrase):
    assert phrase in refusal(write(path, ENTRIES[phrase], bytes(8)))


def test_too_many_tensors_are_refused(path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_TENSORS", 3)
    write(path, {f"t{i}": entry(shape=(0,), end=0) for i in range(4)})
    assert "lists 4 tensors (allowed 3)" in refusal(path)


def test_a_huge_header_length_is_refused_without_reading_it(path):
    for length in (100_000_001, 2**63, 2**64 - 1):
        write(path, b"{}", length=length)
        assert f"would have {length} bytes (allowed 100000000)" in refusal(path)


DISGUISES = {
    "PyTorch pickle": b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00archive/data.pkl",
    "a PyTorch pickle (.ckpt/.pt) with another name": b"\x80\x02}q\x00X\x05\x00\x00\x00model",
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "web page": b"\n<!DOCTYPE html><html></html>",
    "a text file": b'{"error": "Invalid username or password."}',
    "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(16),
    "the file is empty": b"",
    "has only 3 bytes": b"\x01\x02\x03",
    "has only 8 bytes": b"\x40" + bytes(7),
}


@pytest.mark.parametrize("phrase", DISGUISES)
def test_other_kinds_of_file_are_called_by_name(path, phrase):
    path.write_bytes(DISGUISES[phrase])
    assert phrase in refusal(path)


def test_files_saved_by_torch_are_called_pickles(path):
    for zipped in (True, False):
        torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
        assert "this is a PyTorch pickle" in refusal(path)


def test_only_regular_files_with_the_right_name_are_opened(tmp_path):
    assert "'.ckpt'" in refusal(tmp_path / "model.ckpt")
    assert "cannot be read (No such file" in refusal(tmp_path / "absent.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert "not a regular file" in refusal(tmp_path / "folder.safetensors")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        assert "not a regular file" in refusal(tmp_path / "pipe.safetensors")


def test_reading_a_header_reads_no_tensor_data(path):
    size = 2**36
    header = json.dumps({"w": entry("U8", (size,), 0, size)}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    try:
        assert read_header(path).tensors["w"].size_bytes == size
    finally:
        path.unlink()


VALID = (lambda raw: struct.pack("<Q", len(raw)) + raw + bytes(24))(
    json.dumps({"__metadata__": {"config": "{}"}, "a": entry(), "b": entry("BF16", (2, 4), 8, 24)}).encode()
)


def accepted(path):
    """Whether a file is accepted; what is accepted must be readable and stay within the file."""
    try:
        header = read_header(path)
    except CheckpointError:
        return False
    tensors = dict(read_tensors(header, header.tensors, device="cpu"))
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= path.stat().st_size
    header_config(header)
    return True


def header_config(header: Checkpoint):
    try:
        assert isinstance(header.config(), dict)
    except CheckpointError:
        return


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(lambda b: struct.pack("<Q", len(b)) + b)))
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_crash(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(data)
    accepted(path)


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4), st.integers(-9, 9))
@settings(max_examples=400, deadline=None)
def test_mutated_files_never_crash_and_are_accepted_only_if_the_library_accepts_them(tmp_path_factory, changes, longer):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    data = bytearray(VALID + bytes(9))[: len(VALID) + longer]
    for position, value in changes:
        if position < len(data):
            data[position] = value
    path.write_bytes(data)
    if accepted(path):
        with open_with_library(path, "pt") as file:
            assert set(file.keys()) == set(read_header(path).tensors)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__", "\ud800"]),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "F4"]) | JSON,
                "shape": st.lists(st.integers(-1, 4) | st.just(2**62), max_size=3) | JSON,
                "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2) | JSON,
            }
        ),
        max_size=3,
    ),
    st.integers(0, 24),
)
@settings(max_examples=400, deadline=None)
def test_hostile_headers_never_crash(tmp_path_factory, header, size):
    path = write(tmp_path_factory.getbasetemp() / "hostile.safetensors", header, bytes(size))
    accepted(path)


def test_the_library_also_refuses_a_hole_so_the_two_readers_agree(path):
    write(path, {"w": entry(shape=(1,), begin=4, end=8)}, bytes(8))
    with pytest.raises(SafetensorError):
        load_file(path)


def test_config_is_the_json_of_the_metadata(path):
    config = {"transformer": {"num_layers": 2, "norm_eps": 1e-6}, "vae": {}}
    save_file({"w": torch.ones(1)}, path, {"config": json.dumps(config)})
    assert read_header(path).config() == config


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("[1]", "is a list, not an object"),
        ("{", "not valid JSON"),
        ('{"a": 1, "a": 2}', "stands there 2 times"),
        ('{"a": NaN}', "NaN"),
        ("[" * 100_000, "not valid JSON"),
        ('"' + "a" * 1_000_001 + '"', "1000003 characters (allowed 1000000)"),
    ],
)
def test_unusable_config_names_the_file(path, text, phrase):
    save_file({"w": torch.ones(1)}, path, {"config": text})
    header = read_header(path)
    with pytest.raises(CheckpointError) as error:
        header.config()
    assert str(error.value).startswith(f"{path}: ")
    assert phrase in str(error.value)


def write_shapes(path, shapes, metadata=None):
    """The header of a sparse file of zeros in the given shapes; the file itself is gone again."""
    entries, position = {"__metadata__": metadata or {}}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = entry("BF16", shape, position, position + size)
        position += size
    raw = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + position)
    header = read_header(path)
    path.unlink()
    return header


@pytest.mark.parametrize("label", ["2.0", "2.3", "2.5"])
def test_a_full_size_file_without_metadata_gets_the_released_config_and_a_log_line(path, label, caplog):
    release = json.loads((DATA / "transformer_keys.json").read_text())[label]
    header = write_shapes(path, unfold_blocks(release["tensors"], 48))
    assert len(header.tensors) == release["n_tensors"]
    assert header.version().label == label
    with caplog.at_level(logging.WARNING, logger="ltx2"):
        assert header.config() == released_config(label)
    assert f"the released configuration of LTX {label} is assumed" in caplog.text


def test_without_config_and_known_tensors_the_error_says_what_the_file_is(path):
    header = write_shapes(path, {"model.embed_tokens.weight": (2, 2)})
    with pytest.raises(CheckpointError, match=r"no config in the metadata.*looks like a Gemma text encoder"):
        header.config()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*not an LTX-2 checkpoint.*Gemma"):
        header.version()
    header = write_shapes(path, {"w": (1,)}, {"model_version": "2.3.0"})
    assert header.version().numbers == (2, 3, 0)
