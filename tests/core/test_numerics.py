"""The user's choice of numerics: what a model of each computes, says in its log, holds and refuses."""

import logging

import pytest
import torch
from ltx2_engine.kernels.packed import UNPACK_BYTES
from ltx2_engine.ltx2_core import component as component_module
from ltx2_engine.ltx2_core import components as components_module
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.components import unpack_bytes
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.config.numerics import in_eight_bits
from ltx2_engine.ltx2_core.engine import LocalEngine
from ltx2_engine.ltx2_core.evaluate import split_evaluate
from ltx2_engine.ltx2_core.handles import open_engine
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.preflight import open_files
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.tiny import TEXT_ENCODER, checkpoint_file, write_tiny_set
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from ltx2_engine.ltx2_core.tiny_packed import write_tiny_packed

CLIP = ClipShape(9, 64, 64, 24.0)
OFF = StreamGuidance()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("numerics")
    write_tiny_set(root, "2.3")
    checkpoint = root / "checkpoints" / checkpoint_file("2.3")
    checkpoint.rename(checkpoint.with_name("plain.safetensors"))
    for format in ("fp8", "fp8_row", "fp8_cast", "nvfp4"):
        write_tiny_packed(
            checkpoint.with_name(f"{format}.safetensors"), checkpoint.with_name("plain.safetensors"), format
        )
    write_tiny_lora(root / "lora.safetensors", checkpoint.with_name("plain.safetensors"), targets="all", seed=1)
    return root


@pytest.fixture
def spec(models):
    def make(numerics="exact", file="plain", dtype="bfloat16"):
        checkpoint = models / "checkpoints" / f"{file}.safetensors"
        encoder = models / "text_encoders" / TEXT_ENCODER
        return ModelSpec.of(checkpoint, encoder, dtype=dtype, device="cpu", numerics=numerics)

    return make


@pytest.fixture
def engine(spec):
    made = []

    def make(numerics="exact", file="plain", dtype="bfloat16"):
        made.append(LocalEngine(open_files(spec(numerics, file, dtype))))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def features(models):
    checkpoint = models / "checkpoints" / "plain.safetensors"
    chosen = ModelSpec.of(checkpoint, models / "text_encoders" / TEXT_ENCODER, dtype="bfloat16", device="cpu")
    one = LocalEngine(open_files(chosen))
    with torch.inference_mode():
        found = one.encode("a bell rings").features
    one.close()
    return found


def velocity(engine, features, adapters=(), streamed=0):
    """One evaluation of the transformer: every number of both streams, in float64."""
    with torch.inference_mode():
        states = engine._states(AVLatent(CLIP))
        noise = torch.Generator().manual_seed(1)
        x = states.map(lambda s: torch.randn(s.latent.shape, generator=noise).to(s.latent.dtype))
        model = engine._networks["transformer"].use(0, adapters, streamed=streamed)
        context = features.map(lambda part: part.to(engine.dtype))
        evaluate = split_evaluate(model, states, plan_passes(AV(OFF, OFF)), context, None, lambda: None)
        (result,) = evaluate(x, 0.7, AV(True, True))
        return torch.cat([part.double().flatten() for part in result.present()])


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


def test_the_errors_of_the_three_modes(engine, features, capsys):
    want = velocity(engine(dtype="float32"), features)
    found = {name: velocity(engine(name), features) for name in ("exact", "fast", "fp8")}
    errors = {name: error(one, want) for name, one in found.items()}
    with capsys.disabled():
        print("\nerror of a forward against float32:", {name: f"{one:.2%}" for name, one in errors.items()})
        print(f"fp8 against exact bfloat16: {error(found['fp8'], found['exact']):.2%}")
    assert errors["exact"] < 0.02
    assert errors["fast"] < 1.1 * errors["exact"]
    # 2.6 % here; a scale of one neighbour for another would cost far more
    assert errors["exact"] < error(found["fp8"], found["exact"]) < 0.04


@pytest.mark.parametrize("file", ["fp8", "fp8_row", "fp8_cast"])
def test_packed_files_compute_in_eight_bits(engine, features, file, capsys):
    want, got = velocity(engine("exact", file), features), velocity(engine("fp8", file), features)
    with capsys.disabled():
        print(f"\n{file}: fp8 against unpacked weights: {error(got, want):.2%}")
    assert 0 < error(got, want) < 0.03


def test_a_format_without_eight_bit_products_computes_as_with_fast(engine, features):
    assert torch.equal(velocity(engine("fp8", "nvfp4"), features), velocity(engine("fast", "nvfp4"), features))


@pytest.mark.parametrize("policy", ["pair", "pinned", "file", "side"])
def test_loras_come_and_go_in_fp8_resident_and_streamed(engine, spec, models, features, policy, monkeypatch):
    monkeypatch.setattr(component_module, "choose_policy", lambda *_, **__: policy)

    def adapters(strength):
        return components_module.adapters_of(open_files(spec("fp8").with_lora(models / "lora.safetensors", strength)))[
            0
        ]

    one = engine("fp8")
    full, half = adapters(1.0), adapters(0.5)
    base = velocity(one, features)
    first, second = velocity(one, features, full), velocity(one, features, half)
    assert len({base.sum().item(), first.sum().item(), second.sum().item()}) == 3
    assert torch.equal(velocity(one, features), base)
    for streamed in (2, 0, 3):
        # branches are not made for streamed blocks, which are merged; a fresh network says what is right
        other = engine("fp8")
        for loras in (full, (), half):
            assert torch.equal(velocity(one, features, loras, streamed), velocity(other, features, loras, streamed)), (
                streamed
            )
        assert torch.equal(velocity(one, features, (), streamed), base)


def test_what_a_model_in_fp8_holds(engine):
    exact, fp8 = (engine(name)._networks["transformer"] for name in ("exact", "fp8"))
    slots = [slot for slot in fp8._the_store()._slots if in_eight_bits(slot.name)]
    saved = sum(rows * (columns - 4) for rows, columns in (slot.source.weight.shape for slot in slots))
    assert exact.full_bytes - fp8.full_bytes == saved
    assert exact.stack.block - fp8.stack.block == saved // len(fp8.block_bytes)
    assert exact.bits == 16
    assert 8 < fp8.bits < 16
    fp8.use(0)
    assert fp8.bytes_on("cpu") == fp8.full_bytes


def test_the_log_says_which_numerics_run(engine, caplog):
    caplog.set_level(logging.INFO, logger="ltx2.engine")

    def said(numerics, file="plain"):
        caplog.clear()
        engine(numerics, file)._networks["transformer"].use(0)
        return [record for record in caplog.records if "numerics" in record.getMessage()]

    for name in ("exact", "fast"):
        (line,) = said(name)
        assert line.getMessage() == f"the transformer computes with numerics {name}"
    line, warning = said("fp8")
    # 3 blocks with 4 layers in each of 6 attentions and 2 in each of 2 feed-forwards
    assert "84 of its linear layers in eight bits" in line.getMessage()
    assert warning.levelno == logging.WARNING
    assert "float32" in warning.getMessage()
    assert "saves memory, not time" in warning.getMessage()
    assert "0 of its linear layers in eight bits" in said("fp8", "nvfp4")[0].getMessage()


@pytest.mark.parametrize(("units", "wide"), [(True, 0), (False, 8)])
def test_weights_that_are_multiplied_in_eight_bits_are_not_unpacked(spec, units, wide, monkeypatch):
    monkeypatch.setattr(components_module, "has_units", lambda device: units)
    largest = max(
        rows * columns
        for name, (rows, columns) in (
            (slot.name, slot.source.weight.shape)
            for slot in LocalEngine(open_files(spec("fp8")))._networks["transformer"]._the_store()._slots
            if in_eight_bits(slot.name)
        )
    )
    for file in ("plain", "fp8", "fp8_cast"):
        assert unpack_bytes(open_files(spec("fp8", file))) == wide * largest, file
    assert unpack_bytes(open_files(spec("exact", "fp8"))) == UNPACK_BYTES["fp8"] * largest
    assert unpack_bytes(open_files(spec("fp8", "nvfp4"))) == UNPACK_BYTES["nvfp4"] * largest
    assert unpack_bytes(open_files(spec("exact"))) == 0


def test_numerics_belong_to_the_model(spec):
    engines = [open_engine(spec(name)) for name in ("exact", "fast", "fp8")]
    assert len({id(one) for one in engines}) == 3
    assert open_engine(spec("fp8")) is engines[2]


def test_what_does_not_go_together_is_refused(spec):
    with pytest.raises(ValueError, match="numerics 'int4' are not known; choose exact, fast, fp8"):
        spec("int4")
    for dtype in ("float32", "auto"):
        with pytest.raises(ValueError, match=r"numerics fp8 needs bfloat16.*choose dtype bfloat16"):
            spec("fp8", dtype=dtype)
    assert spec("fast", dtype="float32").numerics == "fast"
