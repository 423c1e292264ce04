"""Full-size files with random weights (mean 0, standard deviation 0.02), really written."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.loading.keymap import checkpoint_name, transformer_checkpoint_name
from ltx2_engine.ltx2_core.networks import build_on_meta
from random_model import gemma_folder

STD = 0.02
Shapes = Mapping[str, tuple[int, ...]]


def write_transformer(
    path: Path, config: Mapping[str, Any], model: ModelConfig, label: str, networks: Iterable[str] = ("transformer",)
) -> None:
    """A released checkpoint with these networks."""
    shapes = {
        checkpoint_name(network, name): tuple(tensor.shape)
        for network in networks
        for name, tensor in build_on_meta(network, model).state_dict().items()
    }
    write_random(path, shapes, {"config": json.dumps(config), "model_version": f"{label}.0"})


def write_lora(path: Path, model: ModelConfig, rank: int) -> None:
    """A LoRA for every linear layer of the blocks, as the distilled one has."""
    shapes = {}
    for name, tensor in build_on_meta("transformer", model).state_dict().items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            layer = "diffusion_model." + transformer_checkpoint_name(name.removesuffix(".weight"))
            shapes[f"{layer}.lora_A.weight"] = (rank, tensor.shape[1])
            shapes[f"{layer}.lora_B.weight"] = (tensor.shape[0], rank)
    write_random(path, shapes, {})


def write_random(path: Path, shapes: Shapes, metadata: Mapping[str, str], seed: int = 0) -> None:
    """A safetensors file of random BF16 tensors, made on the GPU where there is one."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for shape in shapes.values():
            tensor = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * STD
            data = memoryview(tensor.cpu().flatten().view(torch.uint8).numpy())
            while data:
                data = data[file.write(data) :]


def write_gemma(folder: Path, layers: int) -> None:
    """A folder of Gemma 3 12B with so many layers, with the tiny tokenizer, whose ids are within the vocabulary."""
    shapes = gemma_folder(folder, layers)
    write_random(folder / "model.safetensors", shapes, {})
