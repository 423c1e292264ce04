import pytest
import torch
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.loading.changes import Adapter
from ltx2_engine.ltx2_core.loading.checkpoint import read_header
from ltx2_engine.ltx2_core.loading.lora.file import read_lora, reference_factors
from ltx2_engine.ltx2_core.loading.lora.report import match
from ltx2_engine.ltx2_core.loading.lora.strength import Strength
from ltx2_engine.ltx2_core.loading.store import load_component
from ltx2_engine.ltx2_core.networks import build_on_meta
from ltx2_engine.ltx2_core.tiny import checkpoint_file, tiny_config
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from torch import nn

SCALE = "reference_downscale_factor"
ONE = Strength.both(1.0)


def on_meta(label):
    return build_on_meta("transformer", ModelConfig.from_config(tiny_config(label), 7, ()))


def matched(file, module):
    return match({name: tuple(p.shape) for name, p in module.named_parameters()}, [(file, ONE)])


@pytest.mark.parametrize("label", ["2.0", "2.3"])
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_it_fits_the_tiny_checkpoint(tiny_models, tmp_path, label, targets):
    path = tmp_path / "loras" / "tiny.safetensors"
    write_tiny_lora(path, tiny_models / "checkpoints" / checkpoint_file(label), targets=targets, metadata={SCALE: "2"})
    file = read_lora(path)
    module = on_meta(label)
    report = matched(file, module)
    linear = {name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    # 3 blocks of 3 attentions with 4 projections in each of two streams
    assert len(report.layers) == (3 * 3 * 4 * 2 if targets == "attention" else len(linear))
    assert set(report.layers) <= linear
    assert not report.files[0].skipped
    assert file.ranks == (4,)
    assert reference_factors([file]) == (2, 1)


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("lora", "LoRA"),
        ("bias", "LoRA"),
        ("dora", "DoRA"),
        ("loha", "LoHa"),
        ("lokr", "LoKr"),
        ("full", "full difference"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kind_changes_weights_by_about_a_third(tiny_models, tmp_path, kind, title, dtype):
    path = tmp_path / "tiny.safetensors"
    checkpoint = tiny_models / "checkpoints" / checkpoint_file("2.3")
    write_tiny_lora(path, checkpoint, targets="all", kind=kind, dtype=dtype, alpha=4.0)
    file = read_lora(path)
    assert file.titles == (title,)
    assert all(
        info.dtype == ("BF16" if dtype == torch.bfloat16 else "F32") for info in file.checkpoint.tensors.values()
    )
    report = matched(file, on_meta("2.3"))
    before, module = (
        load_component(
            on_meta("2.3"),
            read_header(checkpoint),
            "transformer",
            device="cpu",
            dtype=torch.float32,
            adapters=adapters,
        )
        for adapters in ((), (Adapter(file, ONE),))
    )
    biases = {name for name in report.parameters if name.endswith(".bias")}
    assert bool(biases) == (kind in ("bias", "full"))
    changes = [
        float((module.get_parameter(name) - before.get_parameter(name)).norm() / before.get_parameter(name).norm())
        for name in set(report.parameters) - biases
    ]
    assert min(changes) > 0.02
    assert 0.2 < sum(changes) / len(changes) < 0.5


def test_an_alpha_is_written_when_given(tiny_models, tmp_path):
    checkpoint = tiny_models / "checkpoints" / checkpoint_file("2.3")
    write_tiny_lora(tmp_path / "a.safetensors", checkpoint, alpha=6.0)
    assert {layer.scale for layer in read_lora(tmp_path / "a.safetensors").layers.values()} == {1.5}


@pytest.mark.parametrize(("argument", "message"), [("targets", "'attention' or 'all'"), ("kind", "lora, bias, dora")])
def test_other_arguments_are_refused(tiny_models, tmp_path, argument, message):
    checkpoint = tiny_models / "checkpoints" / checkpoint_file("2.3")
    with pytest.raises(ValueError, match=f"{argument} must be {message}.*, found 'ff'"):
        write_tiny_lora(tmp_path / "a.safetensors", checkpoint, **{argument: "ff"})
