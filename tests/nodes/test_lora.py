"""LTX-2 Load LoRA: what its inputs make of the model, what it reports, and when it runs again."""

import pytest
from ltx2_engine.ltx2_core.handles import ModelHandle
from ltx2_engine.ltx2_core.host import use_host
from ltx2_engine.ltx2_core.loading.lora.strength import Strength
from ltx2_engine.ltx2_core.paths import PathError
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from ltx2_engine.nodes.lora import PRECISIONS, LTX2LoadLora


@pytest.fixture(scope="module")
def model(tiny_engine):
    engine = tiny_engine("2.3")
    return ModelHandle(engine.files.spec, engine)


@pytest.fixture
def folder(model, tmp_path):
    """A models folder with two LoRAs, in place as the host's."""
    for seed, name in enumerate(("style", "other")):
        write_tiny_lora(tmp_path / "loras" / f"{name}.safetensors", model.spec.checkpoint, seed=seed)
    with use_host(StandaloneHost([tmp_path], progress="quiet")):
        yield tmp_path / "loras"


def test_inputs_reach_the_transformer_one_by_one(model, folder):
    changed, report = LTX2LoadLora.execute(model, "style.safetensors", 0.8, video=0.5, audio=0.0)
    [one] = changed.engine._adapters
    assert one.file.path == folder / "style.safetensors"
    assert one.strength == Strength(video=0.4, audio=0.0)
    assert one.parity == "float32"
    # 3 blocks of 3 attentions with 4 projections write to the video
    assert report == "style.safetensors (LoRA, rank 4) at strength 0.4 (audio 0): 36 layers changed"
    assert model.lora_report() == "no LoRA"


def test_nodes_in_a_row_add_up_and_report_every_file(model, folder):
    first, _ = LTX2LoadLora.execute(model, "style.safetensors", 1.0)
    both, report = LTX2LoadLora.execute(first, "other.safetensors", -0.5)
    assert [one.file.path.name for one in both.engine._adapters] == ["style.safetensors", "other.safetensors"]
    assert report.splitlines() == [
        "style.safetensors (LoRA, rank 4) at strength 1: 72 layers changed",
        "other.safetensors (LoRA, rank 4) at strength -0.5: 72 layers changed",
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_known_to_the_core(model, folder, precision):
    changed, _ = LTX2LoadLora.execute(model, "style.safetensors", 1.0, precision=precision)
    assert changed.engine._adapters[0].parity == precision


def test_it_runs_again_when_an_input_or_the_file_changes(folder):
    before = LTX2LoadLora.IS_CHANGED("style.safetensors", 1.0)
    assert LTX2LoadLora.IS_CHANGED("style.safetensors", 1.0, video=1.0, audio=1.0, precision="float32") == before
    changes = [{"strength": 0.5}, {"video": 0.5}, {"audio": 0.5}, {"precision": "ltx-core"}]
    results = [LTX2LoadLora.IS_CHANGED(**{"lora": "style.safetensors", "strength": 1.0, **one}) for one in changes]
    assert len({before, *results}) == 5
    (folder / "style.safetensors").touch()
    assert LTX2LoadLora.IS_CHANGED("style.safetensors", 1.0) != before


@pytest.mark.parametrize("name", ["none.safetensors", "../checkpoints/x.safetensors"])
def test_names_that_are_not_listed_are_refused(model, folder, name):
    with pytest.raises(PathError):
        LTX2LoadLora.execute(model, name, 1.0)
