"""The files of one model: separate files make the same model as the full checkpoint, whatever holds which part."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.file_kinds import CONNECTORS, PROJECTION, describe, kind_of, part_of, release_of
from ltx2_engine.ltx2_core.loading import keymap
from ltx2_engine.ltx2_core.loading.checkpoint import Checkpoint, CheckpointError, TensorInfo
from ltx2_engine.ltx2_core.loading.write import write_checkpoint
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.networks import NETWORKS
from ltx2_engine.ltx2_core.preflight import _section, open_files
from ltx2_engine.ltx2_core.tiny import write_tiny_set
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(version, layout) -> the files of a tiny set, by the field of the ModelSpec that takes them."""
    root = tmp_path_factory.mktemp("sets")

    def written(label, layout):
        *model, encoder, lora, upsampler = write_tiny_set(root / label / layout, label, layout)
        fields = ("checkpoint", "video_vae", "audio_vae", "text_projection")
        return {**dict(zip(fields, model, strict=False)), "text_encoder": encoder, "lora": lora, "upsampler": upsampler}

    return {(label, layout): written(label, layout) for label, layout in LAYOUTS}


LAYOUTS = [("2.0", "full"), ("2.0", "split"), ("2.3", "full"), ("2.3", "split"), ("2.5", "split")]


def files(paths, **changes):
    chosen = {name: path for name, path in (paths | changes).items() if name not in ("lora", "upsampler")}
    return open_files(ModelSpec.of(**{name: path for name, path in chosen.items() if path}, dtype="auto", device="cpu"))


def weights(model, network):
    """Name in the module -> its tensor, of everything that fills a network."""
    found = []
    for file in model.of(network):
        with safe_open(file.path, "pt") as opened:
            names = keymap.module_names(network, file.tensors)
            found += [(ours, opened.get_tensor(name)) for name, ours in names.items()]
    assert len(dict(found)) == len(found), "a tensor is there twice"
    return dict(found)


@pytest.mark.parametrize("label", ["2.0", "2.3"])
def test_separate_files_make_the_same_model_as_the_full_checkpoint(sets, label):
    full, split = files(sets[label, "full"]), files(sets[label, "split"])
    assert split.version == full.version
    assert split.config == full.config
    for network in NETWORKS:
        ours, theirs = weights(split, network), weights(full, network)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), network
        assert [file.path for file in full.of(network)] == [sets[label, "full"]["checkpoint"]]


def test_separate_files_each_hold_their_part(sets):
    paths = sets["2.3", "split"]
    model = files(paths)
    held = {network: [file.path for file in model.of(network)] for network in NETWORKS}
    assert held == {
        "transformer": [paths["checkpoint"]],
        "text_head": [paths["text_projection"], paths["checkpoint"]],
        "video_encoder": [paths["video_vae"]],
        "video_decoder": [paths["video_vae"]],
        "audio_encoder": [paths["audio_vae"]],
        "audio_decoder": [paths["audio_vae"]],
        "vocoder": [paths["audio_vae"]],
    }


def test_the_text_encoder_of_2_5_brings_the_projection(sets):
    paths = sets["2.5", "split"]
    assert "text_projection" not in paths
    model = files(paths)
    assert model.version.label == "2.5"
    assert model.config.transformer.keyframe_marker
    assert [file.path for file in model.of("text_head")] == [paths["text_encoder"], paths["checkpoint"]]
    head = weights(model, "text_head")
    assert torch.equal(
        head["projection.video_aggregate_embed.weight"],
        load_file(paths["text_encoder"])["text_embedding_projection.video_aggregate_embed.weight"],
    )
    assert model.text_encoder.version == "gemma4-12b-ltx-v1"


def test_a_chosen_file_wins_over_the_checkpoint(sets, tmp_path):
    full, split = sets["2.3", "full"], sets["2.3", "split"]
    tensors = {name: tensor + 1 for name, tensor in load_file(split["text_projection"]).items()}
    other = tmp_path / "other.safetensors"
    write_checkpoint(other, tensors, {"model_version": "2.3.0"})
    model = files(full, video_vae=split["video_vae"], text_projection=other)
    assert [file.path for file in model.of("video_decoder")] == [split["video_vae"]]
    assert [file.path for file in model.of("vocoder")] == [full["checkpoint"]]
    head = weights(model, "text_head")  # checks that nothing is there twice
    for name, tensor in tensors.items():
        assert torch.equal(head["projection." + name.removeprefix("text_embedding_projection.")], tensor)


def test_parts_can_be_taken_from_a_full_checkpoint(sets):
    full, split = sets["2.3", "full"]["checkpoint"], sets["2.3", "split"]
    model = files(split, video_vae=full, audio_vae=full, text_projection=full)
    assert [file.path for file in model.of("text_head")] == [full], "its connectors go with its projection"
    assert [file.path for file in model.of("transformer")] == [split["checkpoint"]]


def test_a_file_of_projection_and_connectors_serves_a_transformer_without_them(sets, tmp_path):
    """As community files of LTX-2.0 have it."""
    paths = sets["2.0", "split"]
    transformer, both = {}, load_file(paths["text_projection"])
    for name, tensor in load_file(paths["checkpoint"]).items():
        (both if part_of(name) == CONNECTORS else transformer)[name] = tensor
    with safe_open(paths["checkpoint"], "pt") as opened:
        metadata = opened.metadata()
    alone, head = tmp_path / "transformer.safetensors", tmp_path / "head.safetensors"
    write_checkpoint(alone, transformer, metadata)
    write_checkpoint(head, both, {})
    model = files(paths, checkpoint=alone, text_projection=head)
    assert [file.path for file in model.of("text_head")] == [head]
    assert {part_of(name) for name in model.of("text_head")[0].tensors} == {PROJECTION, CONNECTORS}


def test_files_without_prefixes_are_the_same(sets, tmp_path):
    paths = sets["2.3", "split"]
    bare = {}
    for field, prefix in (("checkpoint", "model.diffusion_model."), ("video_vae", "vae.")):
        with safe_open(paths[field], "pt") as opened:
            metadata = opened.metadata()
        bare[field] = tmp_path / f"{field}.safetensors"
        tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(paths[field]).items()}
        write_checkpoint(bare[field], tensors, metadata)
    prefixed, model = files(paths), files(paths, **bare)
    for network in ("transformer", "text_head", "video_encoder", "video_decoder"):
        ours, theirs = weights(model, network), weights(prefixed, network)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), network


# what files are -------------------------------------------------------------------------------------------------------


def header(shapes, metadata=None, name="x.safetensors"):
    """A header that no file has."""
    tensors = {n: TensorInfo(n, "BF16", tuple(shape), 0, 0) for n, shape in shapes.items()}
    return Checkpoint(Path(name), MappingProxyType(metadata or {}), MappingProxyType(tensors), 0, 0)


def released(name, label):
    """name -> shape of a part of a released file."""
    tensors = json.loads((DATA / name).read_text())[label]["tensors"]
    return {key: shape for group in tensors.values() for key, shape in group.items()} if name[0] == "a" else tensors


KINDS = {
    "video_vae_keys.json 2.0": ("video VAE", "LTX-2.0"),
    "video_vae_keys.json 2.5-conv": ("video VAE", "LTX-2.3 or 2.5"),
    "audio_keys.json 2.0": ("audio VAE", "LTX-2.0"),
    "audio_keys.json 2.5": ("audio VAE", "LTX-2.3 or 2.5"),
}


@pytest.mark.parametrize("key", KINDS)
def test_released_vaes_without_metadata_are_known_by_their_tensors(key):
    kind, release = KINDS[key]
    file = header(released(*key.split()))
    assert kind_of(file) == kind
    assert str(release_of(file)) == release
    assert describe(file).startswith(kind)
    assert describe(file).endswith(release)


@pytest.mark.parametrize("label", ["2.0", "2.3"])
@pytest.mark.parametrize("metadata", [{}, {"config": '{"transformer": {}}'}], ids=["no config", "another part's"])
def test_a_file_that_lost_its_configuration_gets_the_released_one(label, metadata):
    file = header(released("video_vae_keys.json", label), metadata)
    assert _section(file.config(), file, "vae") == {"vae": released_config(label)["vae"]}


def test_a_part_of_no_known_layout_needs_its_configuration():
    with pytest.raises(CheckpointError, match="no config in the metadata, and none is known"):
        _section({}, header({"audio_vae.decoder.conv_in.conv.weight": (3, 2)}), "audio_vae")


# the spec -------------------------------------------------------------------------------------------------------------


def test_a_spec_knows_every_file(sets, tmp_path):
    paths = {**sets["2.3", "split"]}
    vae = paths["video_vae"] = tmp_path / "vae.safetensors"
    vae.write_bytes(sets["2.3", "split"]["video_vae"].read_bytes())
    arguments = {name: path for name, path in paths.items() if name not in ("lora", "upsampler")}

    def spec():
        return ModelSpec.of(**arguments, dtype="auto", device="cpu")

    first = spec()
    assert {name for name, *_ in first.identity} >= {str(path) for path in arguments.values() if path.is_file()}
    assert spec() == first
    assert replace(first, video_vae=None) != first
    vae.touch()
    assert spec() != first, "a replaced component is another model"


def test_a_text_encoder_may_be_a_file(sets):
    paths = sets["2.5", "split"]
    spec = ModelSpec.of(paths["checkpoint"], paths["text_encoder"], dtype="auto", device="cpu")
    assert [name for name, *_ in spec.identity] == [str(paths["checkpoint"]), str(paths["text_encoder"])]


def test_specs_need_no_torch():
    script = """
import sys, types
package = types.ModuleType("ltx2_engine")
package.__path__ = [sys.argv[1]]
sys.modules["ltx2_engine"] = package
from ltx2_engine.ltx2_core.model_spec import ModelSpec
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-I", "-S", "-c", script, str(ROOT)], check=True, timeout=60)
