"""Our Gemma, built on the meta device and filled by name, against models that transformers loads itself."""

import pytest
import torch
from ltx2_engine.ltx2_core.testing import assert_close, relative_error
from ltx2_engine.ltx2_core.text import gemma
from ltx2_engine.ltx2_core.text.encoder_config import num_hidden_states, read_config
from ltx2_engine.ltx2_core.text.encoder_files import read_text_encoder
from ltx2_engine.ltx2_core.text.encoder_names import module_name
from ltx2_engine.ltx2_core.text.tokenizer import load_tokenizer, tokenize
from safetensors.torch import load_file

# longer than the local window of 32, so that local and global layers differ
PROMPT = "A fox runs over fresh snow while bells ring far away. Grüße, 雪!"


@pytest.fixture(scope="module")
def files(gemma_folder):
    return read_text_encoder(gemma_folder)


@pytest.fixture(scope="module")
def model(files, load_encoder):
    with torch.inference_mode():
        return load_encoder(files)


@pytest.fixture(scope="module")
def ids(files):
    return tokenize(load_tokenizer(files.tokenizer), PROMPT)


@pytest.fixture(scope="module")
def oracle(gemma_folder):
    from transformers import Gemma3ForConditionalGeneration

    return Gemma3ForConditionalGeneration.from_pretrained(gemma_folder, dtype=torch.float32, local_files_only=True)


def oracle_states(oracle, ids, **kwargs):
    out = oracle.model(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        output_hidden_states=True,
        use_cache=False,
    )
    return torch.stack(out.hidden_states, dim=-1)


def test_states_equal_the_full_model_bit_for_bit(model, oracle, ids):
    states, mask = gemma.hidden_states(model, ids)
    assert len(ids) > model.config.sliding_window
    assert states.shape == (1, len(ids), 64, 7)
    assert mask.tolist() == [[True] * len(ids)]
    assert torch.equal(states, oracle_states(oracle, ids))


def test_states_equal_a_normally_built_text_model(files, model, ids):
    normal = gemma.build_gemma(files.config)
    normal.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(gemma.hidden_states(model, ids)[0], gemma.hidden_states(normal, ids)[0])
    buffers, want = dict(model.named_buffers()), dict(normal.named_buffers())
    assert buffers.keys() == want.keys()
    assert all(torch.equal(buffers[name], want[name]) and buffers[name].dtype == want[name].dtype for name in want)


def test_buffers_stay_float32_beside_bfloat16_weights(files, ids, load_encoder):
    model = load_encoder(files, torch.bfloat16)
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())
    states, _ = gemma.hidden_states(model, ids)
    assert states.dtype == torch.bfloat16
    # sqrt(hidden) is rounded to the embedding's dtype before it multiplies
    want = model.embed_tokens.weight[ids] * torch.tensor(64**0.5, dtype=torch.bfloat16)
    assert torch.equal(states[0, :, :, 0], want)


def test_every_layer_and_the_order_of_states_matter(model, ids):
    states, _ = gemma.hidden_states(model, ids)
    assert all(relative_error(states[..., i], states[..., i + 1]) > 1e-2 for i in range(6))


def test_the_last_state_is_normed_and_the_one_before_is_not(model, ids):
    states, _ = gemma.hidden_states(model, ids)
    rms = (states[..., -1] / (1 + model.norm.weight)).square().mean(dim=2).sqrt()
    assert_close("rms of the last state", rms, torch.ones_like(rms), 1e-4)


def test_left_padding_only_changes_the_rounding(model, ids):
    trimmed, _ = gemma.hidden_states(model, ids)
    padded, mask = gemma.hidden_states(model, ids, pad_to=1024)
    assert mask.shape == (1, 1024)
    assert mask[0, -len(ids) :].all()
    assert int(mask.sum()) == len(ids)
    assert_close("padded states", padded[:, -len(ids) :], trimmed, 1e-5)


def test_the_local_window_hides_old_tokens(model, ids):
    """Two prompts that differ in their first tokens agree, in a local first layer, beyond the window."""
    other = [*ids[:1], ids[1] + 1, *ids[2:]]
    first, _ = gemma.hidden_states(model, ids)
    second, _ = gemma.hidden_states(model, other)
    differs = (first[0, :, :, 1] != second[0, :, :, 1]).any(dim=-1)
    assert differs[1:33].all()
    assert not differs[33:].any()
    assert (first[0, 33:, :, -1] != second[0, 33:, :, -1]).any()


def test_on_layer_is_polled_for_every_layer_and_may_stop(model, ids):
    calls = []
    gemma.hidden_states(model, ids, on_layer=lambda: calls.append(1))
    assert len(calls) == 6

    def stop():
        raise InterruptedError("stopped")

    with pytest.raises(InterruptedError, match="stopped"):
        gemma.hidden_states(model, ids, on_layer=stop)
    gemma.hidden_states(model, ids)  # the hooks are gone


def test_ids_outside_the_vocabulary_are_refused(model):
    for bad in ([], [2, 320], [2, -1]):
        with pytest.raises(gemma.GemmaError, match=r"token ids must be in 0\.\.319"):
            gemma.hidden_states(model, bad)


@pytest.mark.parametrize(
    ("name", "mapped"),
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", None),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", None),
        ("vision_model.embeddings.position_embedding.weight", None),
        ("multi_modal_projector.mm_soft_emb_norm.weight", None),
        ("lm_head.weight", None),
        ("language_model.lm_head.weight", None),
        ("spiece_model", None),
        ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_gate_exps.weight"),
    ],
)
def test_checkpoint_names_map_to_the_text_tower(name, mapped):
    assert module_name(name) == mapped


def test_a_bare_text_config_builds_the_same_module(files):
    config = files.config
    assert num_hidden_states(config) == num_hidden_states(config["text_config"]) == 7
    with torch.device("meta"):
        full, bare = gemma.build_gemma(config), gemma.build_gemma(config["text_config"])
    assert full.state_dict().keys() == bare.state_dict().keys()
    assert all(parameter.is_meta for parameter in full.parameters())


def test_a_config_cannot_choose_the_attention_code(gemma_folder):
    config = read_config(gemma_folder / "config.json")
    config["text_config"] |= {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
    with torch.device("meta"):
        assert gemma.build_gemma(config).config._attn_implementation == "sdpa"


def test_a_config_that_transformers_refuses_is_named(files):
    config = {**files.config["text_config"], "hidden_activation": "no such function"}
    with pytest.raises(gemma.GemmaError, match=r"transformers does not take config\.json of the text encoder"):
        gemma.build_gemma(config)


def test_the_tiny_folder_is_small_and_holds_vision_tensors(gemma_folder):
    assert sum(path.stat().st_size for path in gemma_folder.iterdir()) < 2 * 2**20
    names = load_file(gemma_folder / "model.safetensors")
    assert any(name.startswith("vision_tower.vision_model.") for name in names)
    assert {"language_model.model.norm.weight", "multi_modal_projector.mm_input_projection_weight"} <= names.keys()
