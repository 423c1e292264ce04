"""``ltx2 inspect``: what every kind of file is said to be, what goes with what, and one line for what is broken."""

import json
import pickle
from time import perf_counter

import pytest
import torch
from ltx2_engine import cli
from ltx2_engine.ltx2_core.inspect_files import inspect_files, shown
from ltx2_engine.ltx2_core.loading.checkpoint import read_header
from ltx2_engine.ltx2_core.loading.write import write_checkpoint
from ltx2_engine.ltx2_core.text.tiny_gemma import write_tiny_gemma_file
from ltx2_engine.ltx2_core.tiny import BUNDLE, TEXT_ENCODER, split_file, write_tiny_set
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from ltx2_engine.ltx2_core.tiny_packed import write_tiny_packed
from ltx2_engine.ltx2_core.tiny_upsampler import write_tiny_upsampler
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A models folder with tiny sets of 2.0, 2.3 (both layouts) and 2.5."""
    root = tmp_path_factory.mktemp("models")
    for label, layout in (("2.0", "full"), ("2.3", "full"), ("2.3", "split"), ("2.5", "split")):
        write_tiny_set(root, label, layout)
    return root


def look(*paths):
    found = inspect_files(list(paths))
    return found[0] if len(paths) == 1 else found


def amounts(groups):
    return {group.name: (group.weights, group.parameters, group.bytes) for group in groups}


def counted(path, chosen=lambda name: True):
    """Tensors, numbers and bytes of a safetensors file by safetensors' own reader."""
    tensors = [tensor for name, tensor in load_file(path).items() if chosen(name)]
    return len(tensors), sum(t.numel() for t in tensors), sum(t.numel() * t.itemsize for t in tensors)


# kinds ----------------------------------------------------------------------------------------------------------------

KINDS = {
    "checkpoints/ltx-2.0-tiny.safetensors": ("full checkpoint", "LTX-2.0"),
    "checkpoints/ltx-2.3-tiny.safetensors": ("full checkpoint", "LTX-2.3"),
    split_file("2.3", "transformer"): ("transformer", "LTX-2.3"),
    split_file("2.5", "transformer"): ("transformer", "LTX-2.5"),
    split_file("2.3", "video-vae"): ("video VAE", "LTX-2.3"),
    split_file("2.5", "audio-vae"): ("audio VAE", "LTX-2.5"),
    split_file("2.3", "text-projection"): ("text projection", "LTX-2.3"),
    f"text_encoders/{TEXT_ENCODER}": ("text encoder", None),
    f"text_encoders/{BUNDLE}": ("text encoder", None),
    "loras/ltx-2.3-lora-tiny.safetensors": ("LoRA", None),
    "latent_upscale_models/ltx-2.0-spatial-upscaler-x2-tiny.safetensors": ("upsampler", "LTX-2.0"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_is_recognised(models, name):
    facts = look(models / name)
    assert facts.error is None
    assert (facts.kind, facts.release) == KINDS[name]
    assert facts.fits


@pytest.mark.parametrize("name", [name for name in KINDS if name.endswith(".safetensors")])
def test_amounts_are_those_of_the_file(models, name):
    facts = look(models / name)
    weights, numbers, size = counted(models / name)
    assert facts.parameters == numbers
    assert facts.size_bytes == (models / name).stat().st_size
    for groups in (facts.formats, facts.parts or facts.formats):
        assert [sum(column) for column in zip(*amounts(groups).values(), strict=True)] == [weights, numbers, size]


def test_parts_and_formats_of_a_full_checkpoint(models):
    path = models / "checkpoints" / "ltx-2.3-tiny.safetensors"
    facts = look(path)
    parts = amounts(facts.parts)
    assert set(parts) == {"transformer", "connectors", "text projection", "video VAE", "audio VAE", "vocoder"}
    assert parts["vocoder"] == counted(path, lambda name: name.startswith("vocoder."))
    assert parts["connectors"] == counted(path, lambda name: "_embeddings_connector." in name)
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16}
    tensors = load_file(path)
    assert {name: entry[0] for name, entry in amounts(facts.formats).items()} == {
        name: sum(t.dtype == dtype for t in tensors.values()) for name, dtype in kinds.items()
    }


@pytest.mark.parametrize("format", ["fp8", "fp8_cast", "mxfp8", "nvfp4"])
def test_packed_formats_are_counted_with_their_scales(models, tmp_path, format):
    source, path = models / split_file("2.3", "transformer"), tmp_path / "packed.safetensors"
    write_tiny_packed(path, source, format)
    facts, plain = look(path), look(source)
    assert (facts.kind, facts.release, facts.parameters) == ("transformer", "LTX-2.3", plain.parameters)
    packed = amounts(facts.formats)[format]
    layers = [
        name.removesuffix(".weight")
        for name, t in load_file(path).items()
        if t.itemsize == 1 and name.endswith(".weight")
    ]
    assert packed[0] == len(layers)
    assert packed[1] == sum(load_file(source)[f"{layer}.weight"].numel() for layer in layers)
    assert (
        packed[2]
        == counted(
            path,
            lambda name: any(name.startswith(f"{layer}.weight") or name == f"{layer}.input_scale" for layer in layers),
        )[2]
    )


def test_gguf_transformers(models, tmp_path):
    gguf = pytest.importorskip("gguf")
    source, path = models / split_file("2.3", "transformer"), tmp_path / "ltx-2.3-Q8_0.gguf"
    writer = gguf.GGUFWriter(str(path), "ltxv")
    writer.add_string("config", read_header(source).metadata["config"])
    packed = 0
    for name, tensor in load_file(source).items():
        array, kind = tensor.float().numpy(), gguf.GGMLQuantizationType.F32
        if name.endswith(".to_q.weight"):
            packed += tensor.numel()
            kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(
            name.removeprefix("model.diffusion_model."), gguf.quants.quantize(array, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = look(path)
    assert (facts.kind, facts.release, facts.error) == ("transformer", "LTX-2.3", None)
    assert facts.parameters == look(source).parameters
    assert amounts(facts.formats)["q8_0"][1:] == (packed, packed // 32 * 34)


def test_a_lora_says_what_it_changes(models, tmp_path):
    path = tmp_path / "lora.safetensors"
    write_tiny_lora(
        path, models / split_file("2.3", "transformer"), rank=8, metadata={"reference_downscale_factor": "2"}
    )
    tensors = load_file(path)
    layer = "diffusion_model.transformer_blocks.0.attn1.to_q"
    tensors[f"{layer}.alpha"] = torch.tensor(4.0)
    tensors["diffusion_model.no.such.layer.lora_A.weight"] = torch.zeros(8, 4)
    tensors["diffusion_model.no.such.layer.lora_B.weight"] = torch.zeros(4, 8)
    write_checkpoint(path, tensors, {"reference_downscale_factor": "2"})
    details = look(path).details
    assert details["kinds"] == ["LoRA"]
    assert details["ranks"] == [8]
    assert details["alpha/rank"] == [0.5, 1.0]
    assert details["streams"] == {"video": 36, "audio": 36}
    # four projections in each of three blocks
    assert details["layers"] == {f"{s}.{m}": 12 for s in ("video", "audio") for m in ("attn1", "attn2", "cross_attn")}
    assert details["reference"] == {"downscale factor": 2, "temporal scale factor": 1}
    assert details["skipped"] == {"not a part of the LTX-2 transformer": 1}


def test_other_algebras_are_named(tmp_path):
    name = "diffusion_model.transformer_blocks.0.attn1.to_q."
    path = tmp_path / "lokr.safetensors"
    write_checkpoint(path, {name + "lokr_w1": torch.zeros(4, 4), name + "lokr_w2": torch.zeros(8, 8)}, {})
    facts = look(path)
    assert (facts.kind, facts.details["kinds"], facts.details["ranks"]) == ("LoRA", ["LoKr"], [])


@pytest.mark.parametrize(
    ("kind", "said"),
    [("2.3-spatial-x2", "spatial x2"), ("2.3-spatial-x1.5", "spatial x1.5"), ("2.3-temporal-x2", "temporal x2")],
)
def test_upsamplers(tmp_path, kind, said):
    write_tiny_upsampler(tmp_path / "upsampler.safetensors", kind)
    facts = look(tmp_path / "upsampler.safetensors")
    assert facts.details == {"upsampler": said, "channels": 16}
    assert facts.fits == "latents of LTX-2.3 or 2.5"


def test_text_encoders_in_every_form(models, tmp_path):
    write_tiny_gemma_file(tmp_path / "gemma.safetensors", format="fp8")
    folder, bundle = models / "text_encoders" / TEXT_ENCODER, models / "text_encoders" / BUNDLE
    found = look(folder, bundle, tmp_path / "gemma.safetensors")
    forms = [(facts.details["form"], facts.details["encoder"], facts.details["layers"]) for facts in found]
    assert forms == [("folder", "gemma3", 6), ("bundle", "gemma4-12b-ltx-v1", 6), ("single file", "gemma3", 6)]
    assert [facts.fits for facts in found] == ["LTX-2.0 and 2.3", "LTX-2.5", "LTX-2.0 and 2.3"]
    assert "fp8" in amounts(found[2].formats)
    assert amounts(found[1].parts)["text projection"][0] == 4


def test_the_diffusion_decoder_is_named(tmp_path):
    path = tmp_path / "ltx-2.5-video-vae.safetensors"
    write_checkpoint(path, {"vae.decoder.conv_in_x_t.weight": torch.zeros(2, 2)}, {"model_version": "2.5.0"})
    facts = look(path)
    assert facts.kind == "video VAE"
    assert "ltx-2.5-video-vae-conv-*" in facts.fits


def test_files_of_other_models_are_unknown(tmp_path):
    write_checkpoint(tmp_path / "x.safetensors", {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, {})
    facts = look(tmp_path / "x.safetensors")
    assert (facts.kind, facts.error) == ("unknown", None)
    assert "an unknown kind of model" in facts.details["looks like"]


# what goes together ---------------------------------------------------------------------------------------------------


def test_files_are_compared_with_each_transformer(models):
    names = {
        "full": models / "checkpoints" / "ltx-2.0-tiny.safetensors",
        "transformer": models / split_file("2.3", "transformer"),
        "vae": models / split_file("2.3", "video-vae"),
        "encoder": models / "text_encoders" / TEXT_ENCODER,
        "lora": models / "loras" / "ltx-2.3-lora-tiny.safetensors",
        "upsampler": models / "latent_upscale_models" / "ltx-2.3-spatial-upscaler-x2-tiny.safetensors",
        "broken": models / "none.safetensors",
    }
    found = dict(zip(names, look(*names.values()), strict=True))
    short = {str(path): name for name, path in names.items()}
    goes = {name: [short[path] for path in facts.goes_with] for name, facts in found.items()}
    conflicts = {name: [short[path] for path in facts.conflicts] for name, facts in found.items()}
    # the LoRA changes attention only, which looks the same in both releases
    assert goes == {
        "full": ["encoder", "lora"],
        "transformer": ["vae", "encoder", "lora", "upsampler"],
        "vae": ["transformer"],
        "encoder": ["full", "transformer"],
        "lora": ["full", "transformer"],
        "upsampler": ["transformer"],
        "broken": [],
    }
    assert {name: others for name, others in conflicts.items() if others} == {
        "full": ["vae", "upsampler"],
        "vae": ["full"],
        "upsampler": ["full"],
    }
    assert "its latents are of LTX-2.3, but the transformer is of LTX-2.0" in next(
        iter(found["vae"].conflicts.values())
    )


# the command ----------------------------------------------------------------------------------------------------------


def test_text_for_people(models, capsys):
    name = models / split_file("2.3", "video-vae")
    lora = models / "loras" / "ltx-2.3-lora-tiny.safetensors"
    assert cli.main(["inspect", str(name), str(lora)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0] == f"{name}: video VAE of LTX-2.3, {shown(name.stat().st_size, 'bytes')}"
    assert "  fits       a transformer of LTX-2.3 or 2.5" in lines
    assert "  alpha/rank 1" in lines


def test_json_for_programs(models, capsys):
    path = models / split_file("2.3", "transformer")
    assert cli.main(["inspect", "--json", str(path), str(models / "none.safetensors")]) == 2
    said = capsys.readouterr()
    assert said.err == ""
    report = json.loads(said.out)
    assert report["schema"] == "inspect/1"
    transformer, missing = report["files"]
    assert transformer["path"] == str(path)
    assert transformer["kind"] == "transformer"
    assert transformer["error"] is None
    assert {part["name"]: part["parameters"] for part in transformer["parts"]}["transformer"] > 10**6
    assert missing["error"].startswith("the file cannot be read (No such file or directory)")


def not_safetensors(path):
    path.write_text("<html>404</html>")


def cut(path):
    write_checkpoint(path, {"vae.decoder.conv_in.conv.weight": torch.zeros(100)}, {})
    path.write_bytes(path.read_bytes()[:-100])


def pickled(path):
    path.write_bytes(pickle.dumps({"a": 1}) + bytes(600))


def half_a_pair(path):
    write_checkpoint(path, {"diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 8)}, {})


def unknown_format(path):
    text = torch.tensor(list(b'{"format": "int7"}'), dtype=torch.uint8)
    name = "model.diffusion_model.transformer_blocks.0.attn1.to_q."
    write_checkpoint(path, {name + "weight": torch.zeros(4, 4, dtype=torch.int8), name + "comfy_quant": text}, {})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (not_safetensors, "web page"),
        (cut, "the download is incomplete"),
        (pickled, "pickle"),
        (half_a_pair, "half a pair"),
        (unknown_format, "int7"),
        (lambda path: path.mkdir(), "has no config.json"),
    ],
)
def test_a_bad_file_is_one_line_and_the_others_are_shown(models, tmp_path, capsys, spoil, said):
    path, good = tmp_path / "bad.safetensors", models / split_file("2.3", "video-vae")
    spoil(path)
    assert cli.main(["inspect", str(path), str(good)]) == 2
    printed = capsys.readouterr()
    assert good.name in printed.out
    assert "bad.safetensors" not in printed.out
    assert said in printed.err
    [line] = printed.err.splitlines()
    assert line.startswith(f"{path}: ")
    assert "Traceback" not in printed.err


def test_a_suffix_that_is_no_weight_file(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"x")
    assert "'.ckpt'" in look(path).error


def test_no_file_is_a_wrong_command(capsys):
    assert cli.main(["inspect"]) == 2
    assert "FILE" in capsys.readouterr().err


def test_headers_of_full_size_are_quick(tmp_path):
    """4000 tensors, as in the released transformers, without their data."""
    header, position = {}, 0
    for block in range(48):
        for i in range(84):
            name = f"model.diffusion_model.transformer_blocks.{block}.attn1.extra_{i}.weight"
            header[name] = {"dtype": "BF16", "shape": [64, 64], "data_offsets": [position, position + 8192]}
            position += 8192
    name = "model.diffusion_model.audio_adaln_single.linear.weight"
    header[name] = {"dtype": "BF16", "shape": [4, 4], "data_offsets": [position, position + 32]}
    raw = json.dumps({"__metadata__": {"model_version": "2.3.0"}, **header}).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position + 32)
    start = perf_counter()
    facts = look(path)
    assert perf_counter() - start < 1
    assert facts.kind == "transformer"
    assert facts.parameters == 48 * 84 * 64 * 64 + 16


@pytest.mark.parametrize(
    ("number", "what", "text"),
    [
        (0, "bytes", "0 B"),
        (999, "bytes", "999 B"),
        (999_999, "bytes", "1 MB"),
        (26_917_904, "bytes", "26.9 MB"),
        (42_018_190_584, "bytes", "42 GB"),
        (21_004_000_000, "parameters", "21 B"),
        (3_700_000_000_000_000, "bytes", "3.7e+03 TB"),
    ],
)
def test_numbers_have_three_digits(number, what, text):
    assert shown(number, what) == text
