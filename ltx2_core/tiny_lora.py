"""Tiny random LoRAs in the LTX trainer's layout, for the demo and tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .loading.checkpoint import read_header
from .loading.keymap import COMPONENTS, module_names
from .loading.write import write_checkpoint

_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


def write_tiny_lora(
    path: Path,
    checkpoint: Path,
    rank: int = 4,
    targets: Literal["attention", "all"] = "attention",
    metadata: Mapping[str, str] | None = None,
    seed: int = 0,
) -> None:
    """Write a random LoRA for the transformer of a checkpoint: bfloat16 factors A and B, no alpha.

    At strength 1 it changes the weights of a tiny checkpoint by about a third of their size. targets: the projections
    of every attention, or every linear layer. metadata: the file's, for example reference_downscale_factor.
    """
    if targets not in ("attention", "all"):
        raise ValueError(f"targets must be 'attention' or 'all', found {targets!r}")
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (outputs, inputs) in _linear_layers(checkpoint).items():
        if targets == "all" or name.endswith(_ATTENTION):
            a = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            b = torch.randn(outputs, rank, generator=generator) * 0.3 / math.sqrt(rank)
            tensors[f"diffusion_model.{name}.lora_A.weight"] = a.to(torch.bfloat16)
            tensors[f"diffusion_model.{name}.lora_B.weight"] = b.to(torch.bfloat16)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, tensors, metadata or {})


def _linear_layers(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """The transformer's linear layers, by their name without prefix -> shape of the weight: (out, in)."""
    file = read_header(checkpoint)
    prefix = COMPONENTS["transformer"][0][0]
    return {
        name.removeprefix(prefix).removesuffix(".weight"): file.tensors[name].shape
        for name in module_names("transformer", file.tensors)
        if name.endswith(".weight") and len(file.tensors[name].shape) == 2
    }
