"""LTX-2 Load Model: which files it offers, what it makes of a choice, and that separate files make the same clip."""

import time

import pytest
import torch
from ltx2_engine import cli
from ltx2_engine.ltx2_core.config.numerics import NUMERICS
from ltx2_engine.ltx2_core.host import use_host
from ltx2_engine.ltx2_core.media import read_video
from ltx2_engine.ltx2_core.model_spec import rank_devices
from ltx2_engine.ltx2_core.paths import PathError
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.ltx2_core.tiny import BUNDLE, TEXT_ENCODER, checkpoint_file, split_file, write_tiny_set
from ltx2_engine.nodes.load import FROM_CHECKPOINT, LTX2LoadModel, _spec

SPLIT = {
    "checkpoint": "transformer",
    "video_vae": "video-vae",
    "audio_vae": "audio-vae",
    "text_projection": "text-projection",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for label, layout in (("2.3", "full"), ("2.3", "split"), ("2.5", "split")):
        write_tiny_set(root, label, layout)
    return root


def name(label, kind):
    """What the node lists for a file of the split layout: its name without the folder."""
    return split_file(label, kind).partition("/")[2]


def split(label):
    """The inputs of the node for separate files."""
    encoder = BUNDLE if label == "2.5" else TEXT_ENCODER
    chosen = {field: name(label, kind) for field, kind in SPLIT.items() if (label, field) != ("2.5", "text_projection")}
    return {**chosen, "text_encoder": encoder}


@pytest.fixture
def offered(models):
    """The choices of every input that has some."""
    with use_host(StandaloneHost([models], progress="quiet")):
        sections = LTX2LoadModel.INPUT_TYPES()
    fields = {**sections["required"], **sections["optional"]}
    return {field: options["options"] for field, (kind, options) in fields.items() if kind == "COMBO"}


def test_checkpoints_and_transformer_files_are_offered(offered):
    assert checkpoint_file("2.3") in offered["checkpoint"]
    assert name("2.3", "transformer") in offered["checkpoint"]
    assert name("2.3", "video-vae") not in offered["checkpoint"]


def test_components_come_from_the_checkpoint_unless_told_otherwise(offered):
    for field in ("video_vae", "audio_vae", "text_projection"):
        assert offered[field][0] == FROM_CHECKPOINT
        assert checkpoint_file("2.3") in offered[field], "a full checkpoint can serve"
    assert name("2.3", "video-vae") in offered["video_vae"]
    assert name("2.3", "text-projection") in offered["text_projection"]


def test_gguf_transformers_are_offered(tmp_path):
    (tmp_path / "diffusion_models").mkdir()
    (tmp_path / "diffusion_models" / "ltx-2.3-Q4_K.gguf").touch()
    with use_host(StandaloneHost([tmp_path], progress="quiet")):
        assert LTX2LoadModel.INPUT_TYPES()["required"]["checkpoint"][1]["options"] == ["ltx-2.3-Q4_K.gguf"]


def test_the_weights_of_a_text_encoders_folder_are_not_offered(offered):
    assert not [choice for choices in offered.values() for choice in choices if choice.startswith(f"{TEXT_ENCODER}/")]


def spec(models, **choices):
    host = StandaloneHost([models], progress="quiet")
    components = dict.fromkeys(("video_vae", "audio_vae", "text_projection"), FROM_CHECKPOINT)
    with use_host(host):
        return _spec(**{"dtype": "auto", "device": "cpu", **components, "memory_limit": 0.0, **choices})


def test_choices_become_paths(models):
    found = spec(models, **split("2.3"))
    assert {field: getattr(found, field) for field in SPLIT} == {
        field: models / split_file("2.3", kind) for field, kind in SPLIT.items()
    }
    full = spec(models, checkpoint=checkpoint_file("2.3"), text_encoder=TEXT_ENCODER)
    assert (full.video_vae, full.audio_vae, full.text_projection) == (None, None, None)


def test_a_memory_limit_belongs_to_the_model(models):
    full = {"checkpoint": checkpoint_file("2.3"), "text_encoder": TEXT_ENCODER}
    free, limited = (spec(models, **full, memory_limit=gib) for gib in (0.0, 12.5))
    assert free.limit_bytes is None
    assert limited.limit_bytes == 12.5 * 2**30
    assert free != limited
    with use_host(StandaloneHost([models], progress="quiet")):
        assert LTX2LoadModel.IS_CHANGED(**full) == LTX2LoadModel.IS_CHANGED(**full, memory_limit=0.0)
        assert LTX2LoadModel.IS_CHANGED(**full) != LTX2LoadModel.IS_CHANGED(**full, memory_limit=12.5)


def test_numerics_belong_to_the_model(models):
    full = {"checkpoint": checkpoint_file("2.3"), "text_encoder": TEXT_ENCODER}
    assert spec(models, **full).numerics == "exact"
    assert spec(models, **full, dtype="bfloat16", numerics="fp8").numerics == "fp8"
    with pytest.raises(ValueError, match="numerics fp8 needs bfloat16"):
        spec(models, **full, numerics="fp8")
    with use_host(StandaloneHost([models], progress="quiet")):
        assert LTX2LoadModel.IS_CHANGED(**full) == LTX2LoadModel.IS_CHANGED(**full, numerics="exact")
        assert LTX2LoadModel.IS_CHANGED(**full) != LTX2LoadModel.IS_CHANGED(**full, numerics="fast")


def test_later_inputs_come_last_so_that_saved_workflows_keep_their_order(offered):
    assert list(LTX2LoadModel.INPUT_TYPES()["optional"])[-3:] == ["numerics", "gpus", "topology"]
    assert offered["numerics"] == list(NUMERICS)


class Devices(StandaloneHost):
    """A host with these devices."""

    def __init__(self, models, *present):
        super().__init__([models], progress="quiet")
        self.present = list(present)

    def compute_devices(self):
        return self.present


def several(models, present, **choices):
    with use_host(Devices(models, *present)):
        full = {"checkpoint": checkpoint_file("2.3"), "text_encoder": TEXT_ENCODER, "dtype": "auto"}
        components = dict.fromkeys(("video_vae", "audio_vae", "text_projection"), FROM_CHECKPOINT)
        return _spec(**{**full, **components, "device": "auto", "memory_limit": 0.0, **choices})


TWO_GPUS = ("cuda:0", "cuda:1", "cpu")


def test_gpus_belong_to_the_model(models):
    found = several(models, TWO_GPUS, gpus=2, topology="2x1")
    assert (found.device, found.ranks, found.topology) == ("cuda:0", 2, "2x1")
    assert several(models, ("cpu",), device="cpu", gpus=4).ranks == 4
    assert (several(models, TWO_GPUS, device="cuda:1").ranks, found.base.ranks) == (1, 2)
    assert rank_devices("cuda:0", 2, TWO_GPUS) == ("cuda:0", "cuda:1")
    assert rank_devices("cpu", 3, ("cpu",)) == ("cpu", "cpu", "cpu")


@pytest.mark.parametrize(
    ("present", "choices", "says"),
    [
        (TWO_GPUS, {"gpus": 3}, "3 GPUs cannot share a clip: .*Choose 1, 2, 4, 8"),
        (TWO_GPUS, {"gpus": 4}, "4 GPUs from cuda:0 on .*cuda:2 is not there. This machine has cuda:0, cuda:1, cpu"),
        (TWO_GPUS, {"gpus": 2, "device": "cuda:1"}, "cuda:2 is not there"),
        (("xpu:0", "xpu:1", "cpu"), {"gpus": 2}, "xpu:0 works alone: set gpus to 1"),
        (("cpu",), {"gpus": 2}, "this machine has cpu: set gpus to 1, or device to cpu"),
        (TWO_GPUS, {"gpus": 2, "topology": "2x2"}, "topology 2x2 is not one of 2 GPUs; choose auto, 1x2, 2x1"),
    ],
)
def test_gpus_that_cannot_be_used_are_refused(models, present, choices, says):
    with pytest.raises(ValueError, match=says):
        several(models, present, **choices)


def test_reading_begins_before_another_node_asks(models):
    """Text encoder and transformer arrive without a use; the decoders wait for theirs."""
    with use_host(StandaloneHost([models], progress="quiet")):
        files = {"checkpoint": checkpoint_file("2.3"), "text_encoder": TEXT_ENCODER}
        [handle] = LTX2LoadModel.execute(**files, device="cpu")
        engine = handle.engine
        parts = engine._text_encoder, engine._networks["transformer"]
        deadline = time.monotonic() + 60
        while any(part.pending_bytes for part in parts) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [part.bytes_on("cpu") >= part.full_bytes for part in parts] == [True, True]
        assert engine._networks["video_decoder"].bytes_on("cpu") == 0


def test_a_name_in_two_folders_means_the_first(models, tmp_path):
    for folder in ("checkpoints", "diffusion_models"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.safetensors").touch()
    with use_host(StandaloneHost([tmp_path, models], progress="quiet")):
        found = _spec("same.safetensors", TEXT_ENCODER, "auto", "cpu", *[FROM_CHECKPOINT] * 3, 0.0)
    assert found.checkpoint == tmp_path / "checkpoints" / "same.safetensors"


def test_an_unknown_name_is_refused(models):
    with pytest.raises(PathError, match=r"none\.safetensors"):
        spec(models, **{**split("2.3"), "video_vae": "none.safetensors"})


def test_a_replaced_component_runs_the_node_again(models):
    path = models / split_file("2.3", "video-vae")
    with use_host(StandaloneHost([models], progress="quiet")):
        before = LTX2LoadModel.IS_CHANGED(**split("2.3"))
        assert LTX2LoadModel.IS_CHANGED(**split("2.3")) == before
        path.touch()
        assert LTX2LoadModel.IS_CHANGED(**split("2.3")) != before


def made(request, models, tmp_path, choices):
    """The frames of a small clip by the shipped text-to-video workflow."""
    settings = {
        **{f"LTX2LoadModel.{field}": value for field, value in choices.items()},
        "LTX2EmptyLatent.width": 64,
        "LTX2EmptyLatent.height": 64,
        "LTX2EmptyLatent.frames": 9,
    }
    sets = [part for field, value in settings.items() for part in ("--set", f"{field}={value}")]
    places = ["--models", str(models), "--output", str(tmp_path)]
    workflow = request.path.parents[2] / "workflows" / "api" / "text_to_video.json"
    assert cli.main(["run", str(workflow), *sets, *places, "--quiet"]) == 0
    [video] = tmp_path.rglob("*.mp4")
    return read_video(video).images


def test_separate_files_make_the_same_clip_as_the_full_checkpoint(request, models, tmp_path):
    full = {"checkpoint": checkpoint_file("2.3"), "text_encoder": TEXT_ENCODER}
    one, other = (made(request, models, tmp_path / str(i), choices) for i, choices in enumerate((full, split("2.3"))))
    assert one.std() > 0.01
    assert torch.equal(one, other)


def test_ltx_2_5_makes_a_clip_with_the_convolutional_vae(request, models, tmp_path):
    frames = made(request, models, tmp_path, split("2.5"))
    assert frames.shape == (9, 64, 64, 3)
    assert frames.std() > 0.01
