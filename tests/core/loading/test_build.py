import pytest
import torch
from ltx2_engine.ltx2_core.loading import store
from ltx2_engine.ltx2_core.loading.build import MismatchError, check
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError, read_header
from ltx2_engine.ltx2_core.loading.store import load_component
from ltx2_engine.ltx2_core.loading.write import write_checkpoint
from torch import nn

PREFIX = "model.diffusion_model."


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.patchify_proj = nn.Linear(3, 4)
        self.scale_shift_table = nn.Parameter(torch.empty(2, 4))


class TinyTransformer(nn.Module):
    """A module with the names of the transformer's outer part."""

    def __init__(self):
        super().__init__()
        self.video = Stream()
        self.dropout = nn.Dropout(0.5)


class TinyVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv1d(2, 3, 1)
        self.per_channel_statistics = nn.Module()
        for name in ("mean-of-means", "std-of-means"):
            self.per_channel_statistics.register_buffer(name, torch.empty(5))


class TinyTextHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.ModuleDict({"aggregate_embed": nn.Linear(2, 3, bias=False)})
        self.connectors = nn.ModuleDict({"video": nn.Linear(3, 3, bias=False)})


def on_meta(module):
    with torch.device("meta"):
        return module()


def transformer_tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"patchify_proj.weight": (4, 3), "patchify_proj.bias": (4,), "scale_shift_table": (2, 4)}
    return {PREFIX + name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def vae_tensors(prefix="vae."):
    return {
        prefix + "encoder.conv_in.weight": torch.randn(3, 2, 1),
        prefix + "encoder.conv_in.bias": torch.randn(3),
        prefix + "per_channel_statistics.mean-of-means": torch.randn(5),
        prefix + "per_channel_statistics.std-of-means": torch.rand(5),
        prefix + "per_channel_statistics.channel": torch.randn(7),
        prefix + "decoder.conv_in.bias": torch.randn(3),
    }


@pytest.fixture
def written(tmp_path):
    def write(tensors, metadata=None, name="model.safetensors"):
        write_checkpoint(tmp_path / name, tensors, metadata or {})
        return read_header(tmp_path / name)

    return write


def test_load_component_fills_freezes_and_reports_every_byte(written):
    tensors = transformer_tensors()
    file = written(tensors | {"vae.encoder.conv_in.bias": torch.ones(3)})
    counts = []
    module = load_component(
        on_meta(TinyTransformer), file, "transformer", device="cpu", dtype=torch.bfloat16, on_bytes=counts.append
    )
    got = module.state_dict()
    for name, tensor in tensors.items():
        ours = got["video." + name.removeprefix(PREFIX)]
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, tensor.to(torch.bfloat16))
    assert sum(counts) == 4 * (12 + 4 + 8)
    assert not any(p.requires_grad for p in module.parameters())
    assert not any(m.training for m in module.modules())


def test_loading_during_inference_makes_normal_parameters(written):
    file = written(transformer_tensors())
    with torch.inference_mode():
        module = load_component(on_meta(TinyTransformer), file, "transformer", device="cpu", dtype=torch.float32)
    assert not any(p.is_inference() for p in module.parameters())


@pytest.mark.parametrize("prefix", ["vae.", ""])
def test_buffers_with_hyphens_and_bare_names_load_and_other_statistics_are_ignored(written, prefix):
    tensors = vae_tensors(prefix)
    module = load_component(on_meta(TinyVAE), written(tensors), "video_encoder", device="cpu", dtype=torch.float32)
    statistics = dict(module.per_channel_statistics.named_buffers())
    assert set(statistics) == {"mean-of-means", "std-of-means"}
    for name, value in statistics.items():
        assert torch.equal(value, tensors[f"{prefix}per_channel_statistics.{name}"])
    assert torch.equal(module.conv_in.weight, tensors[prefix + "encoder.conv_in.weight"])


def test_every_difference_is_listed_by_checkpoint_name_before_data_is_read(written, monkeypatch):
    tensors = transformer_tensors()
    tensors[PREFIX + "patchify_proj.weight"] = torch.zeros(4, 5)
    del tensors[PREFIX + "scale_shift_table"]
    tensors[PREFIX + "caption_projection.linear_1.weight"] = torch.zeros(6, 2)
    tensors[PREFIX + "nonsense"] = torch.zeros(1)
    file = written(tensors, {"model_version": "2.3.0"})
    monkeypatch.setattr(store, "read_staged", None)
    with pytest.raises(MismatchError) as error:
        load_component(on_meta(TinyTransformer), file, "transformer", device="cpu", dtype=torch.float32)
    assert error.value.missing == {PREFIX + "scale_shift_table": (2, 4)}
    assert error.value.unexpected == {
        PREFIX + "caption_projection.linear_1.weight": (6, 2),
        PREFIX + "nonsense": (1,),
    }
    assert error.value.wrong_shape == {PREFIX + "patchify_proj.weight": ((4, 5), (4, 3))}
    text = str(error.value)
    assert text.startswith(f"{file.path}: the tensors do not fit the transformer. It looks like ")
    assert "of LTX 2.3.0" in text
    assert "What fits: a full LTX-2 checkpoint" in text
    assert f"1 missing: {PREFIX}scale_shift_table [2, 4]" in text
    assert "2 unexpected: " in text
    assert f"1 of another shape: {PREFIX}patchify_proj.weight is [4, 5], needs [4, 3]" in text


def test_long_lists_are_shortened_in_the_message_only(written):
    extra = {f"{PREFIX}extra_{i:02}": torch.zeros(1) for i in range(40)}
    with pytest.raises(MismatchError) as error:
        check(on_meta(TinyTransformer), written(transformer_tensors() | extra), "transformer")
    assert set(error.value.unexpected) == set(extra)
    text = str(error.value)
    assert "40 unexpected" in text
    assert "extra_11 [1] and 28 more" in text
    assert "extra_12" not in text


def test_check_passes_a_fitting_file_and_reads_nothing(written):
    file = written(transformer_tensors())
    file.path.unlink()
    check(on_meta(TinyTransformer), file, "transformer")


def test_the_same_tensor_under_both_its_names_is_an_error(written):
    tensors = vae_tensors() | {"encoder.conv_in.bias": torch.zeros(3)}
    with pytest.raises(MismatchError, match="2 there more than once: ") as error:
        check(on_meta(TinyVAE), written(tensors), "video_encoder")
    assert set(error.value.repeated) == {"vae.encoder.conv_in.bias", "encoder.conv_in.bias"}


def test_a_component_may_be_spread_over_files(written):
    projection = {"text_embedding_projection.aggregate_embed.weight": torch.randn(3, 2)}
    connector = {PREFIX + "video_embeddings_connector.weight": torch.randn(3, 3)}
    files = [written(projection, name="text.safetensors"), written(connector, name="model.safetensors")]
    module = load_component(on_meta(TinyTextHead), files, "text_head", device="cpu", dtype=torch.float32)
    assert torch.equal(module.projection["aggregate_embed"].weight, *projection.values())
    assert torch.equal(module.connectors["video"].weight, *connector.values())
    with pytest.raises(MismatchError, match=r"1 missing: text_embedding_projection\.aggregate_embed\.weight \[3, 2\]"):
        check(on_meta(TinyTextHead), files[1], "text_head")
    with pytest.raises(MismatchError, match="2 there more than once"):
        check(on_meta(TinyTextHead), [*files, files[0]], "text_head")


def test_integers_in_place_of_weights_are_refused(written):
    change = {PREFIX + "patchify_proj.weight": torch.zeros(4, 3, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"patchify_proj\.weight' is stored as I8, without .* use another file"):
        check(on_meta(TinyTransformer), written(transformer_tensors() | change), "transformer")


def test_fp8_weights_are_unpacked(written):
    cast = torch.randn(4, 3).to(torch.float8_e4m3fn)
    file = written(transformer_tensors() | {PREFIX + "patchify_proj.weight": cast})
    module = load_component(on_meta(TinyTransformer), file, "transformer", device="cpu", dtype=torch.float32)
    assert torch.equal(module.video.patchify_proj.weight, cast.float())


def test_write_replaces_whole_files_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, {"w": torch.ones(2, 3).t()}, {"model_version": "2.3.0"})
    assert read_header(path).tensors["w"].shape == (3, 2)
    before = path.read_bytes()
    shared = torch.ones(3)
    with pytest.raises(RuntimeError):
        write_checkpoint(path, {"v": shared, "w": shared}, {})
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        write_checkpoint(tmp_path / "model.pt", {"w": shared}, {})
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_checkpoint(tmp_path / "taken.safetensors", {"w": shared}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "taken.safetensors"]
