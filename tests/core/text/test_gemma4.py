"""Gemma 4, the text encoder of LTX-2.5: its bundled file, against the model that transformers builds itself."""

import json

import pytest
import torch
from ltx2_engine.ltx2_core.config.fields import ConfigError
from ltx2_engine.ltx2_core.loading.checkpoint import read_header
from ltx2_engine.ltx2_core.testing import assert_close, relative_error
from ltx2_engine.ltx2_core.text import encoder_config, gemma
from ltx2_engine.ltx2_core.text.encoder_files import read_text_encoder
from ltx2_engine.ltx2_core.text.tiny_gemma import GEMMA4_VERSION, write_tiny_gemma4
from ltx2_engine.ltx2_core.text.tokenizer import load_tokenizer, tokenize
from safetensors.torch import load_file, save_file

# longer than the local window of 32
PROMPT = "A fox runs over fresh snow while bells ring far away. Grüße, 雪!"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma4") / "gemma4-with-proj.safetensors"
    write_tiny_gemma4(path, num_layers=7)
    return path


@pytest.fixture(scope="module")
def classes():
    try:
        from transformers import Gemma4UnifiedTextConfig
        from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedTextModel
    except ImportError:
        pytest.skip("this version of transformers has no Gemma 4")
    return Gemma4UnifiedTextConfig, Gemma4UnifiedTextModel


@pytest.fixture(scope="module")
def oracle(bundle, classes):
    """Built and filled the ordinary way, on the CPU."""
    config_class, model_class = classes
    model = model_class(config_class(**json.loads(read_header(bundle).metadata["gemma_config"])["text_config"]))
    tensors = {n.removeprefix("model."): t.float() for n, t in load_file(bundle).items() if n.startswith("model.")}
    model.load_state_dict(tensors, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def ids(bundle):
    return tokenize(load_tokenizer(read_text_encoder(bundle).tokenizer), PROMPT)


def oracle_states(oracle, ids):
    out = oracle(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return torch.stack(out.hidden_states, dim=-1)


def test_the_bundle_says_what_it_is(bundle):
    files = read_text_encoder(bundle)
    assert (files.kind, files.version, files.num_hidden_states, files.width) == ("bundle", GEMMA4_VERSION, 8, 64)
    assert files.projection is files.weights[0]
    assert {name for _, weight, name in files.needed() if not weight.name.startswith("model.")} == set()


def test_states_equal_transformers_bit_for_bit(bundle, oracle, ids, load_encoder):
    model = load_encoder(read_text_encoder(bundle))
    states, mask = gemma.hidden_states(model, ids)
    assert len(ids) > model.config.sliding_window
    assert states.shape == (1, len(ids), 64, 8)
    assert mask.all()
    assert torch.equal(states, oracle_states(oracle, ids))
    assert all(relative_error(states[..., i], states[..., i + 1]) > 1e-2 for i in range(7))


def test_the_first_layers_follow_the_formulas(bundle, oracle, ids, load_encoder):
    """Scale 1, norms by w, normed values, and the layer's scalar; layer 5's values are its keys' projection."""
    weights = load_encoder(read_text_encoder(bundle)).state_dict()
    states = oracle_states(oracle, ids)[0]

    def norm(x, weight=None):
        y = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return y if weight is None else y * weight

    def rope(x, inverse_frequencies):
        angle = torch.outer(torch.arange(len(x)).float(), inverse_frequencies)[:, None]
        first, second = x.chunk(2, -1)
        return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)

    def layer(h, i, head_dim, kv_heads, inverse_frequencies, window):
        w = {n.removeprefix(f"layers.{i}."): t for n, t in weights.items() if n.startswith(f"layers.{i}.")}
        x = norm(h, w["input_layernorm.weight"])
        q = (x @ w["self_attn.q_proj.weight"].T).view(len(h), 4, head_dim)
        raw = (x @ w["self_attn.k_proj.weight"].T).view(len(h), kv_heads, head_dim)
        values = "self_attn.v_proj.weight"
        v = norm((x @ w[values].T).view(raw.shape) if values in w else raw)
        q = rope(norm(q, w["self_attn.q_norm.weight"]), inverse_frequencies)
        k = rope(norm(raw, w["self_attn.k_norm.weight"]), inverse_frequencies)
        k, v = (t.repeat_interleave(4 // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k)
        distance = torch.arange(len(h))[:, None] - torch.arange(len(h))
        scores = scores.masked_fill((distance < 0) | (distance >= window), float("-inf"))
        a = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w["self_attn.o_proj.weight"].T
        h = h + norm(a, w["post_attention_layernorm.weight"])
        x = norm(h, w["pre_feedforward_layernorm.weight"])
        gate = torch.nn.functional.gelu(x @ w["mlp.gate_proj.weight"].T, approximate="tanh")
        x = (gate * (x @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
        return (h + norm(x, w["post_feedforward_layernorm.weight"])) * w["layer_scalar"]

    local = 1e4 ** (-2 * torch.arange(8.0) / 16)
    assert_close("layer 0", layer(states[..., 0], 0, 16, 2, local, 32), states[..., 1], 1e-5)
    wide = 1e6 ** (-2 * torch.arange(16.0) / 32)
    wide[4:] = 0  # a quarter of 32 lanes turns
    assert_close("layer 5", layer(states[..., 5], 5, 32, 1, wide, 10**6), states[..., 6], 1e-5)


def test_buffers_of_the_file_and_computed_ones_keep_their_dtypes(bundle, oracle, ids, load_encoder):
    model = load_encoder(read_text_encoder(bundle), torch.bfloat16)
    held = model.state_dict().keys()
    assert {buffer.dtype for name, buffer in model.named_buffers() if name not in held} == {torch.float32}
    assert model.layers[0].layer_scalar.dtype == torch.bfloat16
    states, _ = gemma.hidden_states(model, ids)
    assert 1e-4 < relative_error(states.float()[..., -1], oracle_states(oracle, ids)[..., -1]) < 0.1


def test_left_padding_only_changes_the_rounding(bundle, classes, ids, load_encoder):
    model = load_encoder(read_text_encoder(bundle))
    trimmed, _ = gemma.hidden_states(model, ids)
    padded, _ = gemma.hidden_states(model, ids, pad_to=128)
    assert_close("padded states", padded[:, -len(ids) :], trimmed, 1e-5)


def test_shapes_are_those_of_transformers(bundle, classes):
    config = read_text_encoder(bundle).config
    released = {
        "model_type": "gemma4_unified_text", "hidden_size": 3840, "num_hidden_layers": 48, "intermediate_size": 15360,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 1, "head_dim": 256,
        "global_head_dim": 512, "attention_k_eq_v": True, "vocab_size": 262144,
    }  # fmt: skip
    separate_values = {**config["text_config"], "attention_k_eq_v": False}
    for case in (config, config["text_config"], released, separate_values):
        with torch.device("meta"):
            want = {name: tuple(t.shape) for name, t in gemma.build_gemma(case).state_dict().items()}
        assert encoder_config.tensor_shapes(case) == want
    shapes = encoder_config.tensor_shapes(released)
    assert len(shapes) == 666
    assert "layers.5.self_attn.v_proj.weight" not in shapes
    assert shapes["layers.47.self_attn.q_proj.weight"] == (8192, 3840)


def test_the_tokenizer_of_gemma_4_adds_no_bos_and_prompts_have_one(bundle):
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer(read_text_encoder(bundle).tokenizer)
    blob = load_file(bundle)["tokenizer_json"].numpy().tobytes()
    assert Tokenizer.from_buffer(blob).encode("the").ids == tokenizer.encode("the")
    assert tokenize(tokenizer, "the") == [2, *tokenizer.encode("the")]


def test_a_hugging_face_folder_of_gemma_4_is_read_too(bundle, classes, tmp_path, ids, load_encoder):
    """Names of the hub: the text tower below ``model.language_model.``."""
    header, tensors = read_header(bundle), load_file(bundle)
    blob = tensors["tokenizer_json"].numpy().tobytes()
    text = {n: t for n, t in tensors.items() if n.startswith("model.")}
    save_file(
        {"model.language_model." + n.removeprefix("model."): t for n, t in text.items()}, tmp_path / "m.safetensors"
    )
    (tmp_path / "config.json").write_text(header.metadata["gemma_config"])
    (tmp_path / "tokenizer.json").write_bytes(blob)
    files = read_text_encoder(tmp_path)
    assert (files.kind, files.version, files.projection) == ("folder", GEMMA4_VERSION, None)
    states, bundled = (gemma.hidden_states(load_encoder(f), ids)[0] for f in (files, read_text_encoder(bundle)))
    assert torch.equal(states, bundled)


def test_features_that_released_encoders_do_not_have_are_refused(bundle):
    config = read_text_encoder(bundle).config
    for key, value in (("num_kv_shared_layers", 2), ("hidden_size_per_layer_input", 16), ("attention_bias", True)):
        with pytest.raises(ConfigError, match=f"{key} is {value}"):
            encoder_config.tensor_shapes({**config, "text_config": {**config["text_config"], key: value}})
    with pytest.raises(gemma.GemmaError, match="layer_types must name"):
        encoder_config.tensor_shapes(
            {**config, "text_config": {**config["text_config"], "layer_types": ["linear"] * 7}}
        )


def test_an_old_transformers_is_named(bundle, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers.models.gemma4_unified.modeling_gemma4_unified", None)
    with pytest.raises(
        gemma.GemmaError, match=r"Gemma 4, which needs transformers 5\.10\.1 or newer; \d.* is installed"
    ):
        gemma.build_gemma(read_text_encoder(bundle).config)
