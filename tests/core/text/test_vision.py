"""Pictures as Gemma 3 sees them, against transformers' own model, and text encoders that see nothing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ltx2_engine.ltx2_core.loading.build import Source
from ltx2_engine.ltx2_core.loading.store import WeightStore
from ltx2_engine.ltx2_core.text.encoder_config import GemmaError
from ltx2_engine.ltx2_core.text.encoder_files import read_text_encoder
from ltx2_engine.ltx2_core.text.enhance import EnhanceRequest, enhance
from ltx2_engine.ltx2_core.text.tiny_gemma import write_tiny_gemma4, write_tiny_gemma_file
from ltx2_engine.ltx2_core.text.tokenizer import load_tokenizer
from ltx2_engine.ltx2_core.text.vision import build_vision, fill_vision_buffers, read_vision

PICTURE = torch.rand(20, 30, 3, generator=torch.Generator().manual_seed(0))


def load(files):
    vision = read_vision(files)
    with torch.device("meta"):
        module = build_vision(vision)
    sources = [Source(name, file, weight) for file, weight, name in vision.weights]
    store = WeightStore(module, sources, device=torch.device("cpu"), dtype=torch.float32)
    store.converge(lambda: (), overlap=False, on_bytes=lambda count: None, stopped=lambda: False)
    fill_vision_buffers(module, torch.device("cpu"))
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    return module


@pytest.fixture(scope="module")
def files(gemma_folder):
    return read_text_encoder(gemma_folder)


@pytest.fixture(scope="module")
def oracle(gemma_folder):
    from transformers import Gemma3ForConditionalGeneration

    return Gemma3ForConditionalGeneration.from_pretrained(gemma_folder, dtype=torch.float32, local_files_only=True)


@pytest.fixture(scope="module")
def tokens(files):
    with torch.inference_mode():
        return load(files)(PICTURE)


def pixels():
    channels_first = PICTURE.movedim(-1, 0)[None]
    return F.interpolate(channels_first, (16, 16), mode="bilinear", antialias=True) * 2 - 1


def test_tokens_of_a_picture_are_those_of_transformers(tokens, oracle):
    want = oracle.get_image_features(pixels())
    want = getattr(want, "pooler_output", want)
    assert tokens.shape == (4, 64)
    assert torch.equal(tokens, want[0])


def test_a_picture_is_read_as_transformers_reads_it(files, tokens, oracle, load_encoder):
    from ltx2_engine.ltx2_core.text.chat import PAD, user_turn
    from ltx2_engine.ltx2_core.text.enhance import writer

    tokenizer = load_tokenizer(files.tokenizer)
    ids = torch.tensor([user_turn(tokenizer, "Say more.", "a fox", len(tokens)).ids])
    seen = {"attention_mask": torch.ones_like(ids), "token_type_ids": (ids == PAD).long()}
    ours = writer(load_encoder(files))(input_ids=ids, pixel_values=tokens[None], **seen).logits
    theirs = oracle(input_ids=ids.where(ids != PAD, oracle.config.image_token_id), pixel_values=pixels(), **seen).logits
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5


def test_the_picture_changes_the_text(files, tokens, load_encoder):
    text, tokenizer = load_encoder(files), load_tokenizer(files.tokenizer)
    tokenizer = replace(tokenizer, decode=lambda ids: "".join(chr(0x4E00 + i) for i in ids))
    asked = EnhanceRequest("a fox", PICTURE, seed=4, max_new_tokens=12, instructions="Say more.")
    first, again, other = (enhance(text, tokenizer, asked, picture) for picture in (tokens, tokens, -tokens))
    assert first == again
    assert first != other


def test_a_single_file_tells_its_vision_tower_by_its_shapes(tmp_path):
    path = tmp_path / "gemma.safetensors"
    write_tiny_gemma_file(path)
    vision = read_vision(read_text_encoder(path))
    assert (vision.config["image_size"], vision.config["patch_size"], vision.config["num_hidden_layers"]) == (16, 4, 1)
    assert (vision.config["num_attention_heads"], vision.pool, vision.width) == (16, 4, 64)
    found = load(read_text_encoder(path))(PICTURE)
    assert found.shape == (1, 64)
    assert found.isfinite().all()


def test_files_that_see_nothing_say_which_do(tmp_path, gemma_folder, write_gguf):
    write_gguf(tmp_path / "gemma.gguf", gemma_folder)
    with pytest.raises(
        GemmaError, match=r"gemma.gguf cannot see pictures: it has no vision tower \(GGUF.*mmproj.*Hugging"
    ):
        read_vision(read_text_encoder(tmp_path / "gemma.gguf"))
    write_tiny_gemma4(tmp_path / "gemma4.safetensors")
    with pytest.raises(GemmaError, match="seen by Gemma 3 only"):
        read_vision(read_text_encoder(tmp_path / "gemma4.safetensors"))


def test_a_tower_of_another_model_is_refused(tmp_path, gemma_folder):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(gemma_folder, tmp_path / "gemma")
    weights = load_file(folder / "model.safetensors")
    del weights["vision_tower.vision_model.post_layernorm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(GemmaError, match=r"not that of a Gemma 3.*tower.post_layernorm.weight \[16\] is missing"):
        read_vision(read_text_encoder(folder))
