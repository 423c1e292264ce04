"""Tiny text encoders in every form that users have them, and a loader of their weights for comparisons."""

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory):
    """A folder as ``write_tiny_gemma`` writes it, with 7 hidden states of width 64."""
    from ltx2_engine.ltx2_core.text.tiny_gemma import write_tiny_gemma

    folder = tmp_path_factory.mktemp("gemma")
    write_tiny_gemma(folder)
    return folder


@pytest.fixture(scope="session")
def load_encoder():
    """files -> the module with its weights, plain, in a dtype."""
    from ltx2_engine.kernels.packed import FORMATS, unpack
    from ltx2_engine.ltx2_core.text import encoder_files, gemma

    stored = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "U8": "uint8"}

    def part(file, info):
        with file.path.open("rb") as raw:
            raw.seek(info.begin)
            data = torch.from_numpy(np.frombuffer(raw.read(info.size_bytes), np.uint8).copy())
        return data.view(getattr(torch, stored[info.dtype])).reshape(info.shape) if info.dtype in stored else data

    def load(files, dtype=torch.float32):
        with torch.device("meta"):
            module = encoder_files.build(files)
        state = {}
        for file, weight, name in files.needed():
            parts = {role: part(file, info) for role, info in weight.parts.items()}
            packed = weight.format in FORMATS
            value = unpack(weight.format, parts, weight.shape, torch.float32) if packed else parts["data"].float()
            state[name] = (value + weight.offset).to(dtype)
        module.load_state_dict(state, strict=True, assign=True)
        gemma.fill_buffers(module, torch.device("cpu"))
        return module

    return load


@pytest.fixture(scope="session")
def write_gguf():
    """Write a folder's Gemma 3 as llama.cpp does: its names, norms with 1 added, its spelling of the vocabulary."""
    gguf = pytest.importorskip("gguf")
    from ltx2_engine.ltx2_core.text.encoder_names import module_name
    from ltx2_engine.ltx2_core.text.tiny_tokenizer import BOS, EOS, PAD, SPECIAL, UNK, pieces
    from safetensors.torch import load_file

    layer = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }

    def llama_name(name):
        if not name.startswith("layers."):
            return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
        _, number, rest = name.split(".", 2)
        return f"blk.{number}.{layer[rest.removesuffix('.weight')]}.weight"

    def write(path, folder, quantization="F32", architecture="gemma3", vocabulary="llama", change=lambda tensors: None):
        writer = gguf.GGUFWriter(path, architecture)
        if vocabulary is not None:
            writer.add_tokenizer_model(vocabulary)
            listed = pieces()
            texts = [p.text.replace("\u2581", " ") if p.kind == 4 else p.text for p in listed]
            writer.add_token_list(texts)
            writer.add_token_scores([p.score for p in listed])
            writer.add_token_types([3 if p.text in SPECIAL else p.kind for p in listed])
            ids = {"bos": BOS, "eos": EOS, "padding": PAD, "unknown": UNK}
            for name, value in ids.items():
                writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
        weights = load_file(folder / "model.safetensors")
        tensors = {llama_name(ours): w.numpy() for n, w in weights.items() if (ours := module_name(n)) is not None}
        tensors = {name: w + 1 if name.endswith("norm.weight") else w for name, w in tensors.items()}
        change(tensors)
        kind = gguf.GGMLQuantizationType[quantization]
        for name, weight in tensors.items():
            if weight.ndim == 1:
                writer.add_tensor(name, weight)
            else:
                writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield
