"""Text encoders in the forms that users have: the same weights give the same states, and wrong files say what they are."""

import json
import shutil

import pytest
import torch
from ltx2_engine.kernels.nvfp4 import pack_nvfp4, unpack_nvfp4
from ltx2_engine.ltx2_core.config.fields import ConfigError
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError
from ltx2_engine.ltx2_core.testing import relative_error
from ltx2_engine.ltx2_core.text import encoder_config, gemma
from ltx2_engine.ltx2_core.text.encoder_files import build, read_text_encoder
from ltx2_engine.ltx2_core.text.tiny_gemma import FORMATS, write_tiny_gemma, write_tiny_gemma_file
from ltx2_engine.ltx2_core.text.tokenizer import TokenizerError, load_tokenizer, tokenize, tokenizer_in_folder
from safetensors.torch import load_file, save_file

PROMPT = "The fox runs over fresh snow while bells ring in the north. Grüße,  雪!"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of the other forms' seed; the local window is the released one, which those cannot state."""
    folder = tmp_path_factory.mktemp("encoders") / "folder"
    write_tiny_gemma(folder, sliding_window=1024)
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    paths = {name: tmp_path_factory.mktemp("single") / f"{name}.safetensors" for name in FORMATS}
    for name, path in paths.items():
        write_tiny_gemma_file(path, format=name)
    return paths


def states(files, load_encoder, dtype=torch.float32):
    ids = tokenize(load_tokenizer(files.tokenizer), PROMPT)
    return gemma.hidden_states(load_encoder(files, dtype), ids)[0]


def changed_states(folder, load_encoder, change):
    """The states of the folder with each weight replaced by ``change(name, weight)``."""
    model = load_encoder(read_text_encoder(folder))
    model.load_state_dict({name: change(name, tensor) for name, tensor in model.state_dict().items()})
    return gemma.hidden_states(model, tokenize(load_tokenizer(tokenizer_in_folder(folder)), PROMPT))[0]


@pytest.fixture(scope="module")
def expected(folder, load_encoder):
    with torch.inference_mode():
        return states(read_text_encoder(folder), load_encoder)


# the same weights in every form ---------------------------------------------------------------------------------------


def test_a_folder_is_read_without_its_vision_tower(folder):
    files = read_text_encoder(folder)
    assert (files.kind, files.version, files.num_hidden_states, files.width) == ("folder", "gemma3", 7, 64)
    assert files.projection is None
    module = build(files)
    assert files.elements == sum(parameter.numel() for parameter in module.parameters())
    assert [set(names.values()) for names in files.names] == [module.state_dict().keys()]


def test_a_single_file_gives_the_folders_states_bit_for_bit(single, expected, load_encoder):
    files = read_text_encoder(single["float32"])
    assert (files.kind, files.version, files.num_hidden_states, files.width) == ("single file", "gemma3", 7, 64)
    assert torch.equal(states(files, load_encoder), expected)


def test_bfloat16_weights_are_those_of_the_folder_rounded(single, folder, load_encoder):
    ours = states(read_text_encoder(single["bfloat16"]), load_encoder, torch.bfloat16)
    assert torch.equal(ours, states(read_text_encoder(folder), load_encoder, torch.bfloat16))


def fp8(weight):
    scale = weight.abs().amax() / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize(
    ("name", "format", "rounded"),
    [
        ("fp8", "fp8", fp8),
        ("fp8_old", "fp8", fp8),
        ("fp8_cast", "fp8_cast", lambda weight: weight.to(torch.float8_e4m3fn).float()),
        ("nvfp4", "nvfp4", lambda weight: unpack_nvfp4(*pack_nvfp4(weight), torch.float32)),
    ],
)
def test_packed_single_files_give_the_states_of_their_rounded_weights(
    single, folder, expected, load_encoder, name, format, rounded
):
    files = read_text_encoder(single[name])
    assert {w.format for _, w, ours in files.needed() if "_proj." in ours} == {format}
    assert {w.format for _, w, ours in files.needed() if "_proj." not in ours} == {"plain"}

    def change(ours, weight):
        return rounded(weight) if "_proj." in ours else weight.bfloat16().float()

    found = states(files, load_encoder)
    assert torch.equal(found, changed_states(folder, load_encoder, change))
    assert relative_error(found, expected) > 1e-3


def test_both_spellings_of_scaled_fp8_are_the_same_weights(single, load_encoder):
    first, second = (states(read_text_encoder(single[name]), load_encoder) for name in ("fp8", "fp8_old"))
    assert torch.equal(first, second)


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0"])
def test_a_gguf_gives_the_states_of_its_rounded_weights(tmp_path, folder, load_encoder, write_gguf, quantization):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "gemma.gguf"
    write_gguf(path, folder, quantization)
    files = read_text_encoder(path)
    assert (files.kind, files.version, files.num_hidden_states, files.width) == ("gguf", "gemma3", 7, 64)

    def change(ours, weight):
        if ours.endswith("norm.weight"):
            return (weight + 1) - 1  # as llama.cpp stores it, which rounds
        kind = gguf.GGMLQuantizationType[quantization]
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))

    assert torch.equal(states(files, load_encoder), changed_states(folder, load_encoder, change))


def test_the_configuration_of_a_file_without_one_is_the_folders(single, folder):
    ours = read_text_encoder(single["bfloat16"]).config
    given = read_text_encoder(folder).config["text_config"]
    assert {key: ours[key] for key in given} == given


def test_sizes_of_the_release_follow_from_its_shapes():
    """Gemma 3 12B as its config.json states it."""
    heads, inner, width = 16, 15360, 3840
    layer = {
        "self_attn.q_proj": (heads * 256, width),
        "self_attn.k_proj": (8 * 256, width),
        "self_attn.q_norm": (256,),
        "mlp.gate_proj": (inner, width),
    }
    shapes = {f"layers.{i}.{name}.weight": shape for i in range(48) for name, shape in layer.items()}
    config = encoder_config.gemma3_config({"embed_tokens.weight": (262208, width), **shapes}, "x")
    released = {
        "vocab_size": 262208, "hidden_size": 3840, "num_hidden_layers": 48, "intermediate_size": 15360,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 1024, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rms_norm_eps": 1e-6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "max_position_embeddings": 131072,
    }  # fmt: skip
    assert {key: config[key] for key in released} == released
    with torch.device("meta"):
        module = gemma.build_gemma(config)
    globals_ = [i for i, kind in enumerate(module.config.layer_types) if kind == "full_attention"]
    assert globals_ == [5, 11, 17, 23, 29, 35, 41, 47]
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == encoder_config.tensor_shapes(config)


# checks ---------------------------------------------------------------------------------------------------------------


def rewritten(source, path, change):
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, path)
    return path


def test_missing_unexpected_and_misshapen_tensors_are_named(single, tmp_path):
    def change(tensors):
        del tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.k_norm.weight"] = torch.zeros(17)
        tensors["model.layers.1.mlp.router.weight"] = torch.zeros(4, 4)
        tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)

    path = rewritten(single["bfloat16"], tmp_path / "bad.safetensors", change)
    with pytest.raises(gemma.GemmaError) as error:
        read_text_encoder(path)
    for part in (
        f"{path} does not hold the weights of a gemma3 text encoder of 6 layers of width 64",
        "layers.2.mlp.up_proj.weight [128, 64] is missing",
        "model.layers.0.self_attn.k_norm.weight is [17], needs [16]",
        "model.layers.1.mlp.router.weight of shape [4, 4] is unexpected",
        "model.norm.weight is I8, needs floating-point numbers",
        "gemma_3_12B_it.safetensors",
    ):
        assert part in str(error.value)


def test_a_shard_that_is_there_twice_is_found(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "twice")
    shutil.copy(folder / "model.safetensors", tmp_path / "twice" / "copy.safetensors")
    with pytest.raises(gemma.GemmaError, match="is there more than once"):
        read_text_encoder(tmp_path / "twice")


def test_sizes_are_bounded_before_anything_is_built(single, tmp_path):
    def change(tensors):
        tensors["model.layers.9999.mlp.up_proj.weight"] = torch.zeros(1)

    path = rewritten(single["bfloat16"], tmp_path / "deep.safetensors", change)
    with pytest.raises(ConfigError, match="num_hidden_layers must be between 1 and 512"):
        read_text_encoder(path)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 10**6}
        )
    )
    with pytest.raises(ConfigError, match=r"config\.json\.num_hidden_layers must be between 1 and 512"):
        read_text_encoder(tmp_path)


def test_a_tensor_of_another_llama_cpp_model_is_unexpected(folder, tmp_path, write_gguf):
    path = tmp_path / "gemma.gguf"
    write_gguf(
        path,
        folder,
        change=lambda tensors: tensors.update({"blk.0.ffn_gate_exps.weight": tensors["token_embd.weight"]}),
    )
    with pytest.raises(gemma.GemmaError, match=r"blk\.0\.ffn_gate_exps\.weight of shape \[320, 64\] is unexpected"):
        read_text_encoder(path)


def test_the_files_of_a_folder_follow_its_index(folder, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    halves = {name: {n: t for i, (n, t) in enumerate(tensors.items()) if i % 2 == k} for k, name in enumerate("ab")}
    for name, half in halves.items():
        save_file(half, tmp_path / f"{name}.safetensors")
    whole = read_text_encoder(tmp_path)
    assert [file.path.name for file in whole.weights] == ["a.safetensors", "b.safetensors"]
    assert whole.elements == read_text_encoder(folder).elements

    def index(*names):
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}}))

    shutil.copy(folder / "model.safetensors", tmp_path / "stale.safetensors")
    index("b.safetensors", "a.safetensors", "b.safetensors")
    assert [file.path.name for file in read_text_encoder(tmp_path).weights] == ["a.safetensors", "b.safetensors"]
    index("a.safetensors", "c.safetensors")
    with pytest.raises(gemma.GemmaError, match=r"lacks c\.safetensors"):
        read_text_encoder(tmp_path)
    for odd in ("../a.safetensors", "..\\a.safetensors", "a.bin"):
        index(odd)
        with pytest.raises(gemma.GemmaError, match="same folder"):
            read_text_encoder(tmp_path)


# wrong files ----------------------------------------------------------------------------------------------------------


def save(tmp_path, names, metadata=None):
    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"encoder.down_blocks.0.conv.weight": (2, 2), "decoder.conv_in.conv.weight": (2, 2)}, "a video VAE"),
        ({"vision_model.embeddings.position_embedding.weight": (4, 4)}, "the vision part of a text encoder"),
        ({"model.vision_tower.encoder.layers.0.mlp.fc1.weight": (4, 4)}, "the vision part of a text encoder"),
        ({"model.diffusion_model.audio_adaln_single.linear.weight": (2, 2)}, "an LTX-2"),
        ({"text_embedding_projection.video_aggregate_embed.weight": (2, 2)}, "text projections without a transformer"),
        ({"encoder.block.0.layer.0.SelfAttention.k.weight": (2, 2)}, "an unknown kind of model"),
        ({"transformer_blocks.0.attn1.to_q.lora_A.weight": (2, 2)}, "a LoRA"),
        ({"model.embed_tokens.weight": (8, 8), "model.layers.0.self_attn.q_norm.weight": (4,)}, "but not Gemma 3"),
        ({"model.layers.0.layer_scalar": (1,), "model.embed_tokens.weight": (8, 8)}, "Gemma 4 text encoder without the gemma_config"),
        ({"model.layers.0.pre_feedforward_layernorm.weight": (8,)}, "tensor embed_tokens.weight of a Gemma 3 text encoder is missing"),
    ],
)  # fmt: skip
def test_wrong_files_say_what_they_are_and_what_fits(tmp_path, names, message):
    path = save(tmp_path, names)
    with pytest.raises(gemma.GemmaError) as error:
        read_text_encoder(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "LTX-2.0 and 2.3 use Gemma 3 12B" in str(error.value)
    assert "gemma4-12b-with-proj-ltx-2.5" in str(error.value)


def test_the_vision_file_of_llama_cpp_is_refused(folder, tmp_path, write_gguf):
    write_gguf(tmp_path / "mmproj.gguf", folder, architecture="clip")
    with pytest.raises(CheckpointError, match=r"model of kind 'clip'.*gemma3 \(its text encoder, without the vision"):
        read_text_encoder(tmp_path / "mmproj.gguf")


def test_other_folders_and_endings_are_refused(tmp_path, gemma_folder):
    with pytest.raises(gemma.GemmaError, match=r"no config\.json"):
        read_text_encoder(tmp_path)
    for kind in ("t5", None, 3):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(gemma.GemmaError, match=f"{str(kind)!r}; supported are 'gemma3'"):
            read_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(gemma.GemmaError, match="not valid JSON"):
        read_text_encoder(tmp_path)
    shutil.copy(gemma_folder / "config.json", tmp_path)
    with pytest.raises(gemma.GemmaError, match=r"no \.safetensors file; .* a single \.gguf file"):
        read_text_encoder(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"ends in '\.bin'"):
        read_text_encoder(tmp_path / "model.bin")


def test_a_config_in_the_metadata_is_checked(tmp_path):
    names = {"model.embed_tokens.weight": (8, 8)}
    for text, message in (
        ("{", "gemma_config is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"model_type": "llama"}', "'llama'; supported"),
        ("[" * 100_000, "not valid JSON"),
        ('{"model_type": "gemma4_unified", "text_config": 3}', "must be an object"),
    ):
        with pytest.raises(ValueError, match=message):
            read_text_encoder(save(tmp_path, names, {"gemma_config": text}))


# tokenizers -----------------------------------------------------------------------------------------------------------


def without_tokenizer(single, path):
    path.parent.mkdir(exist_ok=True)
    return rewritten(single["bfloat16"], path, lambda tensors: tensors.pop("spiece_model"))


@pytest.mark.parametrize("place", [".", "gemma", "tokenizer"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_without_a_tokenizer_takes_one_beside_it(single, tmp_path, gemma_folder, place, name):
    from ltx2_engine.ltx2_core.text.tiny_tokenizer import spiece_model

    path = without_tokenizer(single, tmp_path / "gemma.safetensors")
    with pytest.raises(TokenizerError, match=r"Put tokenizer\.json or tokenizer\.model .* into .*/gemma, a folder"):
        read_text_encoder(path)
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / name).write_bytes(
        (gemma_folder / name).read_bytes() if name.endswith("json") else spiece_model()
    )
    source = read_text_encoder(path).tokenizer
    assert source.path == tmp_path / place / name
    assert tokenize(load_tokenizer(source), PROMPT) == tokenize(
        load_tokenizer(tokenizer_in_folder(gemma_folder)), PROMPT
    )


def test_a_gguf_without_a_vocabulary_takes_a_tokenizer_beside_it(folder, tmp_path, write_gguf):
    path = tmp_path / "gemma.gguf"
    write_gguf(path, folder, vocabulary=None)
    with pytest.raises(TokenizerError, match=r"gemma\.gguf holds no tokenizer"):
        read_text_encoder(path)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    assert read_text_encoder(path).tokenizer.path == tmp_path / "tokenizer.json"
