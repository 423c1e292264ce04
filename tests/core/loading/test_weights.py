import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ltx2_engine.kernels.packed import unpack
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError, read_header, read_tensors
from ltx2_engine.ltx2_core.loading.weights import weights_of
from ltx2_engine.ltx2_core.tiny import checkpoint_file
from ltx2_engine.ltx2_core.tiny_packed import FORMATS, write_tiny_packed
from safetensors.torch import load_file, save_file

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def zeros(dtype, *shape):
    return torch.zeros(shape).to(dtype)


def e8m0(*shape):
    return torch.full(shape, 127, dtype=torch.uint8).view(E8M0)


def declared(text):
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return torch.tensor(list(raw), dtype=torch.uint8)


def header(path, tensors, metadata=None):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)  # it refuses shared memory
    return read_header(path)


def found(path, tensors, metadata=None):
    """Logical name -> (format, shape, roles)."""
    weights = weights_of(header(path, tensors, metadata))
    return {name: (w.format, w.shape, "".join(f" {role}" for role in sorted(w.parts))) for name, w in weights.items()}


def refusal(path, tensors, metadata=None):
    file = header(path, tensors, metadata)
    assert isinstance(file.looks_like(), str)
    with pytest.raises(CheckpointError) as error:
        weights_of(file)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


SCALAR = torch.tensor(0.01)
NVFP4 = {"a.weight": zeros(torch.uint8, 8, 32), "a.weight_scale": zeros(E4M3, 128, 4), "a.weight_scale_2": SCALAR}
MXFP8 = {"a.weight": zeros(E4M3, 8, 64), "a.weight_scale": e8m0(128, 4)}
FP8 = {"a.weight": zeros(E4M3, 8, 64), "a.weight_scale": SCALAR}


# what is found -------------------------------------------------------------------------------------------------------


def test_plain_tensors_are_themselves(path):
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool)
    tensors = {str(kind): torch.zeros(2, 3, dtype=kind) for kind in kinds} | {"a.weight": torch.zeros(()).bfloat16()}
    got = found(path, tensors)
    assert got == {name: ("plain", tuple(tensor.shape), " data") for name, tensor in tensors.items()}
    assert list(got) == list(read_header(path).tensors)


def test_official_fp8_has_scales_beside_its_weights(path):
    tensors = {**FP8, "a.input_scale": SCALAR, "a.bias": zeros(torch.bfloat16, 8)}
    assert found(path, tensors) == {
        "a.weight": ("fp8", (8, 64), " data input_scale scale"),
        "a.bias": ("plain", (8,), " data"),
    }


@pytest.mark.parametrize("scale", [(), (1,), (1, 1), (200,), (200, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_every_granularity_of_fp8_scales(path, scale, dtype, scale_dtype):
    tensors = {"a.weight": zeros(dtype, 200, 300), "a.weight_scale": torch.ones(scale, dtype=scale_dtype)}
    assert found(path, tensors) == {"a.weight": ("fp8", (200, 300), " data scale")}


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_fp8_without_a_scale_is_a_cast(path, dtype):
    tensors = {"a.weight": zeros(dtype, 8, 64), "a.bias": zeros(dtype, 8), "b.weight": zeros(dtype, 3, 3, 3)}
    assert found(path, tensors) == {n: ("fp8_cast", tuple(t.shape), " data") for n, t in tensors.items()}


@pytest.mark.parametrize("marker", ["scaled_fp8", "model.diffusion_model.scaled_fp8"])
def test_comfyuis_older_names(path, marker):
    tensors = {
        marker: zeros(E4M3, 2),
        "a.weight": zeros(E4M3, 8, 64),
        "a.scale_weight": torch.ones(1),
        "a.scale_input": torch.ones(1),
        "b.weight": zeros(torch.bfloat16, 8, 64),
        "norm.weight": zeros(E4M3, 8),
    }
    assert found(path, tensors) == {
        "a.weight": ("fp8", (8, 64), " data input_scale scale"),
        "b.weight": ("plain", (8, 64), " data"),
        "norm.weight": ("fp8_cast", (8,), " data"),
    }
    del tensors["a.scale_weight"], tensors["a.scale_input"]
    message = refusal(path, tensors)
    assert (
        "tensor 'a.weight' is fp8 and has no weight_scale: needed is F64 or F32 or F16 or BF16 with one number"
        in message
    )


def test_nvfp4_and_mxfp8_are_told_from_their_dtypes(path):
    assert found(path, NVFP4) == {"a.weight": ("nvfp4", (8, 64), " data scale scale_2")}
    assert found(path, {**NVFP4, "a.input_scale": SCALAR})["a.weight"][2] == " data input_scale scale scale_2"
    for scale in (e8m0(128, 4), zeros(torch.uint8, 128, 4)):
        assert found(path, {**MXFP8, "a.weight_scale": scale}) == {"a.weight": ("mxfp8", (8, 64), " data scale")}


@pytest.mark.parametrize(
    ("name", "tensors", "want"),
    [
        ("float8_e4m3fn", FP8, "fp8"),
        ("float8_e5m2", {**FP8, "a.weight": zeros(E5M2, 8, 64)}, "fp8"),
        ("nvfp4", NVFP4, "nvfp4"),
        ("mxfp8", MXFP8, "mxfp8"),
    ],
)
def test_comfyuis_declarations(path, name, tensors, want):
    entry = {"format": name, "full_precision_matrix_mult": True}
    beside = found(path, {**tensors, "a.comfy_quant": declared(entry)})
    assert beside["a.weight"][:2] == (want, (8, 64))
    assert list(beside) == ["a.weight"]
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"a": entry}})}
    assert found(path, tensors, metadata) == beside
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    assert found(path, prefixed, metadata)["model.diffusion_model.a.weight"][0] == want


def test_a_layers_own_declaration_comes_before_the_files(path):
    metadata = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "nvfp4"}, "gone": {"format": "x"}}})}
    tensors = {**FP8, "a.comfy_quant": declared({"format": "float8_e4m3fn"})}
    assert found(path, tensors, metadata)["a.weight"][0] == "fp8"
    assert "'a.weight' is F8_E4M3, but nvfp4 is U8" in refusal(path, FP8, metadata)


def test_a_declaration_comes_before_what_dtypes_suggest(path):
    """Scales of bytes suggest mxfp8; the declaration says fp8, for which they do not fit."""
    tensors = {**MXFP8, "a.comfy_quant": declared({"format": "float8_e4m3fn"})}
    assert "'a.weight_scale' is F8_E8M0 of shape [128, 4], beside a weight in fp8" in refusal(path, tensors)


def test_bytes_of_a_weight_are_those_of_its_parts(path):
    weights = weights_of(header(path, {**NVFP4, "a.input_scale": SCALAR}))
    assert weights["a.weight"].size_bytes == 8 * 32 + 128 * 4 + 4 + 4


def test_weights_are_found_once_per_file(path):
    file = header(path, FP8)
    assert weights_of(file) is weights_of(file)
    assert weights_of(read_header(path)) is not weights_of(file)


# a transformer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("comfy_quant", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("label", ["2.0", "2.3"])
def test_a_packed_models_release_is_told_and_its_values_are_read(tiny_models, path, label, format, comfy_quant):
    plain = tiny_models / "checkpoints" / checkpoint_file(label)
    if comfy_quant and format == "fp8_cast":
        with pytest.raises(ValueError, match="cannot be declared"):
            write_tiny_packed(path, plain, format, comfy_quant=True)
        return
    write_tiny_packed(path, plain, format, comfy_quant=comfy_quant)
    file, original = read_header(path), read_header(plain)
    assert file.version() == original.version()
    assert file.looks_like() == original.looks_like()
    assert file.shapes == original.shapes
    assert file.config() == original.config()
    want_format = format if format in ("fp8_cast", "mxfp8", "nvfp4") else "fp8"
    packed = {name: w for name, w in weights_of(file).items() if w.format != "plain"}
    assert {w.format for w in packed.values()} == {want_format}
    assert len(packed) == 3 * 28  # 6 attentions of 4 layers and 2 feed-forwards of 2, in 3 blocks
    raw, values = dict(read_tensors(file, file.tensors, device="cpu")), load_file(plain)
    for name, weight in packed.items():
        parts = {role: raw[info.name] for role, info in weight.parts.items()}
        got = unpack(weight.format, parts, weight.shape, torch.float32)
        want = values[name].float()
        error = float((got - want).norm() / want.norm())
        assert error < (0.15 if format == "nvfp4" else 0.06), f"{name}: {error}"


def test_the_release_is_told_without_metadata_too(tiny_models, path):
    plain = tiny_models / "checkpoints" / checkpoint_file("2.3")
    write_tiny_packed(path, plain, "nvfp4")
    bare = path.with_name("bare.sft")
    save_file(load_file(path), bare)
    assert read_header(bare).version().label == "2.3"


def test_a_refused_format_is_named_where_the_release_is_asked_for(path):
    file = header(path, {**FP8, "a.comfy_quant": declared({"format": "int8_tensorwise"})})
    with pytest.raises(CheckpointError, match="'int8_tensorwise'"):
        file.version()
    with pytest.raises(CheckpointError, match="'int8_tensorwise'"):
        _ = file.shapes


# what is refused -----------------------------------------------------------------------------------------------------

I8 = {"a.weight": torch.zeros(8, 64, dtype=torch.int8), "a.weight_scale": torch.ones(8, 1)}


@pytest.mark.parametrize(
    ("entry", "shown"),
    [
        ({"format": "int8_tensorwise"}, "'int8_tensorwise'"),
        ({"format": "int8_tensorwise", "convrot": True, "group_size": 256}, "'int8_tensorwise with convrot'"),
        ({"format": "convrot_w4a4"}, "'convrot_w4a4'"),
        ({"format": "asym_w4a8_int8"}, "'asym_w4a8_int8'"),
        ({"format": "float8_e4m3fn", "convrot": True}, "'float8_e4m3fn with convrot'"),
        ({"format": "x" * 300}, "'xxx"),
    ],
)
def test_other_formats_are_refused_by_name_with_what_is_read(path, entry, shown):
    read = "what is read is bf16, fp16, float32, fp8 (float8_e4m3fn, float8_e5m2), mxfp8, nvfp4, and GGUF"
    message = refusal(path, {**I8, "a.comfy_quant": declared(entry)})
    assert f"tensor 'a.comfy_quant' says that weights are stored as {shown}" in message
    assert read in message
    assert len(message) < 1000
    metadata = {"_quantization_metadata": json.dumps({"layers": {"a": entry}})}
    message = refusal(path, I8, metadata)
    assert f"_quantization_metadata of 'a' says that weights are stored as {shown}" in message


AGAIN = "the file is damaged or was converted wrongly: get it again"
WRONG = {
    "'a.weight' is I8 with 'a.weight_scale' beside it": I8,
    "'a.weight' is BF16 with 'a.weight_scale' beside it": {**FP8, "a.weight": zeros(torch.bfloat16, 8, 64)},
    "'a.weight_scale' belongs to 'a.weight', which is missing": {"a.weight_scale": SCALAR},
    "'a.comfy_quant' belongs to 'a.weight', which is missing": {"a.comfy_quant": declared({"format": "nvfp4"})},
    "'a.scale_weight' and 'a.weight_scale' are the same thing": {**FP8, "a.scale_weight": SCALAR},
    "'a.weight' is fp8 and has no weight_scale: needed is F64 or F32 or F16 or BF16 with one number, of shape [8, 1] "
    "(rows) or of shape [1, 1] (blocks)": {"a.weight": zeros(E4M3, 8, 64), "a.input_scale": SCALAR},
    "'a.weight_scale' is F32 of shape [7], beside a weight in fp8 of shape [8, 64]": {
        **FP8,
        "a.weight_scale": torch.ones(7),
    },
    "'a.weight_scale' is I32 of shape []": {**FP8, "a.weight_scale": torch.tensor(3, dtype=torch.int32)},
    "'a.input_scale' is F32 of shape [2]": {**FP8, "a.input_scale": torch.ones(2)},
    "'a.weight_scale_2' is F32 of shape [], beside a weight in fp8 of shape [8, 64]: such a weight has none": {
        **FP8,
        "a.weight_scale_2": SCALAR,
    },
    "'a.weight' is fp8 of shape [8]": {**FP8, "a.weight": zeros(E4M3, 8)},
    "'a.weight' is nvfp4 and has no weight_scale_2": {k: t for k, t in NVFP4.items() if k != "a.weight_scale_2"},
    "'a.weight' is nvfp4 and has no weight_scale:": {k: t for k, t in NVFP4.items() if k != "a.weight_scale"},
    "'a.weight_scale' is F8_E4M3 of shape [8, 4], beside a weight in nvfp4 of shape [8, 64]: needed is F8_E4M3 of shape "
    "[128, 4]": {**NVFP4, "a.weight_scale": zeros(E4M3, 8, 4)},
    "'a.weight_scale' is F32 of shape [128, 4]": {**NVFP4, "a.weight_scale": torch.ones(128, 4)},
    "'a.weight_scale_2' is F32 of shape [8]": {**NVFP4, "a.weight_scale_2": torch.ones(8)},
    "'a.weight' is nvfp4 with rows of 24 weights: they must be a multiple of 16": {
        **NVFP4,
        "a.weight": zeros(torch.uint8, 8, 12),
    },
    "'a.weight_scale' is F8_E8M0 of shape [8, 2], beside a weight in mxfp8 of shape [8, 64]: needed is F8_E8M0 or U8 of "
    "shape [128, 4]": {**MXFP8, "a.weight_scale": e8m0(8, 2)},
    "'a.weight' is mxfp8 with rows of 48 weights": {**MXFP8, "a.weight": zeros(E4M3, 8, 48)},
    "'a.comfy_quant' is not valid JSON": {**FP8, "a.comfy_quant": declared(b"{")},
    "'a.comfy_quant' is not valid JSON ('utf-8'": {**FP8, "a.comfy_quant": declared(b"\xff")},
    "tensor 'a.comfy_quant' names no format": {**FP8, "a.comfy_quant": declared({"formats": "nvfp4"})},
    "'a.comfy_quant' is U8 of 65537 bytes: it must be U8 of at most 65536": {
        **FP8,
        "a.comfy_quant": zeros(torch.uint8, 65537),
    },
    "'a.comfy_quant' is F32": {**FP8, "a.comfy_quant": torch.zeros(8)},
    "'a.weight' is F8_E4M3, but float8_e5m2 is F8_E5M2": {**FP8, "a.comfy_quant": declared({"format": "float8_e5m2"})},
    "'a.weight' is fp8 and has no weight_scale": {
        "a.weight": zeros(E4M3, 8, 64),
        "a.comfy_quant": declared({"format": "float8_e4m3fn"}),
    },
}


@pytest.mark.parametrize("phrase", WRONG)
def test_parts_that_do_not_belong_together_are_refused(path, phrase):
    assert phrase in refusal(path, WRONG[phrase])


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("{", "'_quantization_metadata' is not valid JSON"),
        ("[" * 100_000, "'_quantization_metadata' is not valid JSON"),
        ("[]", 'is not an object with "layers"'),
        ('{"layers": []}', 'is not an object with "layers"'),
        ('{"layers": {"a": 3}}', "_quantization_metadata of 'a' names no format"),
        ('{"layers": {"a": {"format": null}}}', "names no format"),
        (" " * 4_000_001, "has 4000001 characters (allowed 4000000)"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused(path, text, phrase):
    assert phrase in refusal(path, FP8, {"_quantization_metadata": text})


def test_a_file_cut_short_after_its_header_was_read(path):
    file = header(path, {**FP8, "z.weight": zeros(E4M3, 8, 64), "z.comfy_quant": declared({"format": "nvfp4"})})
    path.write_bytes(path.read_bytes()[: file.tensors["z.comfy_quant"].end - 3])
    with pytest.raises(CheckpointError, match=r"ends inside tensor 'z\.comfy_quant'"):
        weights_of(file)
    path.unlink()
    with pytest.raises(CheckpointError, match="reading failed"):
        weights_of(file)


# hostile files -------------------------------------------------------------------------------------------------------

DTYPES = st.sampled_from([E4M3, E5M2, E8M0, torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.int32])
SHAPES = st.sampled_from([(), (1,), (0,), (8,), (8, 1), (1, 1), (8, 64), (8, 32), (128, 4), (8, 2), (0, 64), (1, 2, 3)])
NAMES = [f"{layer}{end}" for layer in ("a", "b", "") for end in (
    ".weight", ".bias", ".weight_scale", ".scale_weight", ".weight_scale_2", ".input_scale", ".scale_input", "scaled_fp8",
)]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FORMAT_NAMES = ["float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise", "x"]
ENTRIES = st.fixed_dictionaries({"format": st.sampled_from(FORMAT_NAMES)}, optional={"convrot": st.booleans()}) | JSON
LAYERS = st.dictionaries(st.sampled_from(["a", "b", "", "c"]), ENTRIES, max_size=3)
METADATA = st.one_of(
    st.fixed_dictionaries({"layers": LAYERS}).map(json.dumps), JSON.map(json.dumps), st.text(max_size=20)
)


@given(
    st.dictionaries(st.sampled_from(NAMES), st.tuples(DTYPES, SHAPES), max_size=6),
    st.dictionaries(
        st.sampled_from(["a", "b"]), ENTRIES.map(json.dumps).map(str.encode) | st.binary(max_size=20), max_size=2
    ),
    st.none() | METADATA,
)
@settings(max_examples=600, deadline=None)
def test_any_mixture_is_understood_or_refused(tmp_path_factory, layout, declarations, metadata):
    path = tmp_path_factory.getbasetemp() / "mixture.safetensors"
    tensors = {}
    for name, (dtype, shape) in layout.items():
        size = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
        tensors[name] = torch.zeros(size, dtype=torch.uint8).view(dtype).reshape(shape)
    tensors |= {f"{layer}.comfy_quant": declared(text) for layer, text in declarations.items() if text}
    save_file(tensors, path, None if metadata is None else {"_quantization_metadata": metadata})
    file = read_header(path)
    began = time.monotonic()
    message = f"{path}: "
    weights = {}
    try:
        weights = weights_of(file)
    except CheckpointError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert isinstance(file.looks_like(), str)
    assert time.monotonic() - began < 1
    raw = dict(read_tensors(file, file.tensors, device="cpu"))
    for weight in weights.values():
        assert all(info is file.tensors[info.name] for info in weight.parts.values())
        if weight.format != "plain":
            parts = {role: raw[info.name] for role, info in weight.parts.items()}
            assert unpack(weight.format, parts, weight.shape, torch.float32).shape == weight.shape
