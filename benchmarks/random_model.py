"""A full-size model without its files: real headers over empty space on disk, random weights made on the GPU."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.config.upsampler import UpsamplerConfig
from ltx2_engine.ltx2_core.host import Interrupted
from ltx2_engine.ltx2_core.loading import staged, store
from ltx2_engine.ltx2_core.loading.keymap import checkpoint_name, transformer_checkpoint_name
from ltx2_engine.ltx2_core.networks import NETWORKS, build_on_meta
from ltx2_engine.ltx2_core.text import gemma
from ltx2_engine.ltx2_core.text.encoder_config import read_config
from ltx2_engine.ltx2_core.text.tiny_gemma import write_tiny_gemma
from ltx2_engine.ltx2_core.upsampler_files import build_upsampler

STD = 0.02
GEMMA_12B = {
    "vocab_size": 262208,
    "hidden_size": 3840,
    "num_hidden_layers": 48,
    "intermediate_size": 15360,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "max_position_embeddings": 131072,
}


def write_full_size(root: Path, label: str, config: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """Lay out a checkpoint and Gemma 3 12B below ``root``; returns their names in the model folders.

    config: of the checkpoint, by default the released one.
    """
    config = released_config(label) if config is None else config
    model = ModelConfig.from_config(config, GEMMA_12B["num_hidden_layers"] + 1, ())
    shapes = {
        checkpoint_name(network, name): tuple(tensor.shape)
        for network in NETWORKS
        for name, tensor in build_on_meta(network, model).state_dict().items()
    }
    checkpoint = f"ltx-{label}-random.safetensors"
    metadata = {"config": json.dumps(config), "model_version": f"{label}.0"}
    _write_sparse(root / "checkpoints" / checkpoint, shapes, metadata)
    encoder = root / "text_encoders" / "gemma-3-12b-random"
    _write_gemma(encoder)
    return checkpoint, encoder.name


def write_full_size_upsampler(root: Path) -> str:
    """Lay out the spatial x2 upsampler of 2.3 below ``root``; returns its name."""
    config = {
        "in_channels": 128,
        "mid_channels": 1024,
        "num_blocks_per_stage": 4,
        "dims": 3,
        "spatial_upsample": True,
        "temporal_upsample": False,
        "spatial_scale": 2.0,
        "rational_resampler": False,
    }
    module = build_upsampler(UpsamplerConfig.from_config(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    name = "ltx-2.3-spatial-upscaler-x2-random.safetensors"
    metadata = {"config": json.dumps(config), "model_version": "2.3.0"}
    _write_sparse(root / "latent_upscale_models" / name, shapes, metadata)
    return name


def write_full_size_lora(root: Path, label: str, rank: int) -> str:
    """Lay out a LoRA for every linear layer of the blocks below ``root``, as the distilled one has; returns its name."""
    model = ModelConfig.from_config(released_config(label), GEMMA_12B["num_hidden_layers"] + 1, ())
    shapes = {}
    for name, tensor in build_on_meta("transformer", model).state_dict().items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            layer = "diffusion_model." + transformer_checkpoint_name(name.removesuffix(".weight"))
            shapes[f"{layer}.lora_A.weight"] = (rank, tensor.shape[1])
            shapes[f"{layer}.lora_B.weight"] = (tensor.shape[0], rank)
    name = f"ltx-{label}-distilled-lora-{rank}-random.safetensors"
    _write_sparse(root / "loras" / name, shapes, {})
    return name


def _write_gemma(folder: Path) -> None:
    _write_sparse(folder / "model.safetensors", gemma_folder(folder), {})


def gemma_folder(folder: Path, layers: int = 48) -> dict[str, tuple[int, ...]]:
    """Write what a Gemma 3 12B folder holds besides weights; returns the weights' names and shapes.

    The tokenizer is the tiny one, whose ids are within the large vocabulary.
    """
    write_tiny_gemma(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {
        key: config["text_config"][key]
        for key in ("model_type", "bos_token_id", "eos_token_id", "pad_token_id")
        if key in config["text_config"]
    }
    config["text_config"] = kept | GEMMA_12B | {"num_hidden_layers": layers}
    path.write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        module = gemma.build_gemma(read_config(folder / "config.json"))
    for old in folder.glob("*.safetensors"):
        old.unlink()
    return {f"language_model.model.{name}": tuple(t.shape) for name, t in module.state_dict().items()}


def _write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> None:
    """A safetensors file of BF16 tensors whose data is a hole."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


@contextlib.contextmanager
def random_weights(device: str) -> Iterator[None]:
    """Inside the block, reading a tensor gives random values made on ``device``; everything else of loading is real.

    A tensor's values depend on its name and shape alone, not on where it goes or what was read before it.
    """
    maker = device

    def read_staged(requests, *, device, allocate=None, on_bytes=None, stopped=None, **_):
        generator = torch.Generator(maker)  # several threads read
        for request in requests:
            if stopped is not None and stopped():
                raise Interrupted("the reading was stopped")
            given = None if allocate is None else allocate(request)
            tensor = given.tensor if isinstance(given, staged.Room) else given
            if tensor is None:
                tensor = torch.empty(request.info.torch_shape, dtype=request.info.torch_dtype, device=device)
            generator.manual_seed(zlib.crc32(request.info.name.encode()))
            values = torch.randn(tensor.shape, generator=generator, device=maker, dtype=torch.bfloat16)
            tensor.copy_(values.mul_(STD))
            if on_bytes is not None:
                on_bytes(request.info.size_bytes)
            yield request, tensor

    with contextlib.ExitStack() as stack:
        for module in (staged, store):
            stack.callback(setattr, module, "read_staged", module.read_staged)
            module.read_staged = read_staged
        yield
