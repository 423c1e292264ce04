"""The engine and its node enhance prompts: every form of a text encoder, interrupts, progress, and memory."""

import time
import types

import pytest
import torch
from ltx2_engine.ltx2_core import enhancing
from ltx2_engine.ltx2_core.component import Component
from ltx2_engine.ltx2_core.handles import ModelHandle, open_engine
from ltx2_engine.ltx2_core.host import Interrupted, use_host
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.ltx2_core.text.encoder_config import GemmaError
from ltx2_engine.ltx2_core.text.enhance import EnhanceError, EnhanceRequest
from ltx2_engine.ltx2_core.text.tiny_gemma import write_tiny_gemma_file
from ltx2_engine.ltx2_core.tiny import BUNDLE, TEXT_ENCODER, checkpoint_file, split_file, write_tiny_set
from ltx2_engine.nodes.prompt import LTX2EnhancePrompt

PICTURE = torch.rand(2, 20, 30, 4, generator=torch.Generator().manual_seed(0))
# a seed with which the tiny encoders write letters
SEED = 1


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def engine(tiny_engine):
    return tiny_engine("2.3")


@pytest.fixture
def opened(tiny_models):
    """A function from a text encoder to an engine with it."""

    def open_with(encoder):
        checkpoint = tiny_models / "checkpoints" / checkpoint_file("2.3")
        return open_engine(ModelSpec.of(checkpoint, encoder, dtype="float32", device="cpu"))

    return open_with


def request(prompt="a fox runs", **settings):
    return EnhanceRequest(prompt, **{"seed": SEED, "max_new_tokens": 24, **settings})


def test_an_engine_enhances_and_its_memory_stays_as_it_was(engine):
    before = engine.encode("a fox")
    encoder = engine._text_encoder
    held, network = encoder.bytes_on("cpu"), encoder.use(0)
    text = engine.enhance(request())
    assert text == engine.enhance(request())
    assert text != engine.enhance(request(seed=SEED + 1))
    assert text != engine.enhance(request(image=PICTURE[0, ..., :3]))
    assert (encoder.bytes_on("cpu"), encoder.use(0)) == (held, network)
    after = engine.encode("a fox")
    assert torch.equal(before.features.video, after.features.video)


def test_nothing_is_read_for_it_but_the_vision_tower(engine, monkeypatch):
    engine.encode("a fox")
    read = []
    converge = Component._converge
    monkeypatch.setattr(Component, "_converge", lambda self, *rest: (read.append(self.label), converge(self, *rest)))
    engine.enhance(request())
    assert read == []
    engine.enhance(request(image=PICTURE[0, ..., :3]))
    assert read == ["vision tower"]


@pytest.mark.parametrize("format", ["bfloat16", "fp8", "nvfp4"])
def test_packed_encoders_write_and_see(format, opened, tmp_path):
    from ltx2_engine.ltx2_core.loading.linear import PackedLinear

    write_tiny_gemma_file(tmp_path / "gemma.safetensors", format=format)
    engine = opened(tmp_path / "gemma.safetensors")
    text = engine.enhance(request())
    assert text == engine.enhance(request())
    assert text != engine.enhance(request(image=PICTURE[0, ..., :3]))
    packed = any(isinstance(module, PackedLinear) for module in engine._text_encoder.use(0).modules())
    assert packed == (format != "bfloat16")
    engine.close()


def test_gemma_4_is_refused_before_anything_is_read(tmp_path):
    write_tiny_set(tmp_path, "2.5")
    files = {
        name: tmp_path / split_file("2.5", kind)
        for name, kind in (("checkpoint", "transformer"), ("video_vae", "video-vae"), ("audio_vae", "audio-vae"))
    }
    engine = open_engine(
        ModelSpec.of(text_encoder=tmp_path / "text_encoders" / BUNDLE, dtype="float32", device="cpu", **files)
    )
    with pytest.raises(
        EnhanceError, match=r"trained to encode and not to write. Enhance with the model of LTX-2\.0 or 2\.3"
    ):
        engine.enhance(request())
    assert engine._text_encoder.bytes_on("cpu") == 0


def test_a_file_without_a_vision_tower_takes_words_only(opened, tmp_path, tiny_models):
    from safetensors.torch import load_file, save_file

    write_tiny_gemma_file(tmp_path / "gemma.safetensors")
    weights = load_file(tmp_path / "gemma.safetensors")
    seeing = ("vision_model.", "multi_modal_projector.")
    save_file({name: w for name, w in weights.items() if not name.startswith(seeing)}, tmp_path / "words.safetensors")
    engine = opened(tmp_path / "words.safetensors")
    assert engine.enhance(request())
    with pytest.raises(GemmaError, match=r"words\.safetensors cannot see pictures: it has no vision tower\. Choose"):
        engine.enhance(request(image=PICTURE[0, ..., :3]))
    engine.close()


def test_every_token_is_progress_and_an_interrupt_ends_within_one(engine):
    class Counting(StandaloneHost):
        stop_at, seen = None, 0

        def progress(self, total, label, node_id=None):
            shown, step = super().progress(total, label, node_id), None
            if label == "enhancing the prompt":
                step = shown.step
                assert total == 24

                def count(n=1, picture=None):
                    self.seen += n
                    if self.seen == self.stop_at:
                        self.interrupt()
                    step(n, picture)

                shown.step = count
            return shown

    host = Counting(progress="quiet")
    with use_host(host):
        engine.enhance(request())
        assert 1 <= host.seen <= 24
        host.seen, host.stop_at = 0, 2
        with pytest.raises(Interrupted):
            engine.enhance(request())
        assert host.seen == 2
        host.stop_at = None
        assert engine.enhance(request())


def test_a_streamed_encoder_is_said_to_be_slow(caplog):
    encoder = types.SimpleNamespace(device="cuda:0", full_bytes=24 << 30, bytes_on=lambda device: 4 << 30)
    enhancing._warn_of_streaming(encoder)
    assert "20.0 GiB of it are copied there again for every token, so this takes minutes" in caplog.text


def test_ranks_write_what_the_engine_does_and_stop_together(engine):
    from ltx2_engine.ltx2_core.enhancing_over_ranks import enhance_prompt_over_ranks
    from ltx2_engine.ltx2_core.parallel.helix_topology import ONE

    def by_ranks(asked):
        files, encoder, tokenizer = engine.files, engine._text_encoder, engine._tokenizer
        return enhance_prompt_over_ranks(files, encoder, tokenizer, asked, engine.dtype, ONE)

    pictured = request(image=PICTURE[0, ..., :3])
    assert (by_ranks(request()), by_ranks(pictured)) == (engine.enhance(request()), engine.enhance(pictured))
    host = StandaloneHost(progress="quiet")
    with use_host(host):
        progress, begun = host.progress, []

        def stopped_at_once(total, label, node_id=None):
            begun.append(label)
            shown = progress(total, label, node_id)
            host.interrupt()
            return shown

        host.progress = stopped_at_once
        with pytest.raises(Interrupted):
            by_ranks(request())
        assert begun == ["enhancing the prompt"]


def test_the_node_hands_on_what_it_was_given_and_shows_the_text(engine, monkeypatch):
    given = []
    monkeypatch.setattr(type(engine), "enhance", lambda self, request: (given.append(request), "A fox.")[1])
    model = ModelHandle(engine.files.spec, engine)
    assert LTX2EnhancePrompt.execute(model, "fox", 3) == {"ui": {"text": ["A fox."]}, "result": ("A fox.",)}
    LTX2EnhancePrompt.execute(model, "fox", 3, PICTURE, 64, 0.2, "be brief", "tensor")
    first, second = given
    assert (first.prompt, first.seed, first.image, first.instructions, first.topology) == ("fox", 3, None, "", "auto")
    assert (first.max_new_tokens, first.temperature) == (512, 0.7)
    assert torch.equal(second.image, PICTURE[0, ..., :3])
    assert (second.max_new_tokens, second.temperature) == (64, 0.2)
    assert (second.instructions, second.topology) == ("be brief", "tensor")


def test_a_workflow_writes_and_encodes(tiny_models, tmp_path):
    """The node between a model and its prompt, through the runner."""
    from ltx2_engine.nodes import NODE_CLASS_MAPPINGS as OURS
    from ltx2_engine.nodes.runner.execute import execute
    from ltx2_engine.nodes.runner.validate import validate

    prompt = {
        "1": {
            "class_type": "LTX2LoadModel",
            "inputs": {"checkpoint": checkpoint_file("2.3"), "text_encoder": TEXT_ENCODER},
        },
        "2": {
            "class_type": "LTX2EnhancePrompt",
            "inputs": {"model": ["1", 0], "prompt": "a fox", "seed": SEED, "max_new_tokens": 24},
        },
    }
    host = StandaloneHost([tiny_models], tmp_path, tmp_path, progress="quiet")
    with use_host(host):
        start = time.monotonic()
        result = execute(validate(prompt, OURS), OURS, host)
    assert time.monotonic() - start < 20
    [text] = result.outputs["2"]["text"]
    assert text
