"""Tiny random LoRAs, for the demo and tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .loading.checkpoint import read_header
from .loading.keymap import COMPONENTS, module_names
from .loading.write import write_checkpoint

_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
# root mean square of the differences, for weights of mean square 1 / inputs
_SIZE = 0.3


def write_tiny_lora(
    path: Path,
    checkpoint: Path,
    rank: int = 4,
    targets: Literal["attention", "all"] = "attention",
    metadata: Mapping[str, str] | None = None,
    seed: int = 0,
    kind: str = "lora",
    alpha: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a random LoRA for the transformer of a checkpoint, in the LTX trainer's layout.

    At strength 1 it changes the weights of a tiny checkpoint by about a third of their size. targets: the projections
    of every attention, or every linear layer. metadata: the file's, for example reference_downscale_factor.
    kind: lora, bias (with a bias in factor B), dora, loha, lokr, or full (differences of weights and biases).
    alpha: written when given. dtype: of every tensor.
    """
    if targets not in ("attention", "all"):
        raise ValueError(f"targets must be 'attention' or 'all', found {targets!r}")
    if kind not in _KINDS:
        raise ValueError(f"kind must be {', '.join(_KINDS)}, found {kind!r}")
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (outputs, inputs) in _linear_layers(checkpoint).items():
        if targets == "all" or name.endswith(_ATTENTION):
            made = _KINDS[kind](outputs, inputs, rank, generator)
            if alpha is not None:
                made["alpha"] = torch.tensor(alpha)
            tensors |= {f"diffusion_model.{name}.{end}": tensor.to(dtype) for end, tensor in made.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, tensors, metadata or {})


def _lora(outputs: int, inputs: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    a = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
    b = torch.randn(outputs, rank, generator=generator) * _SIZE / math.sqrt(rank)
    return {"lora_A.weight": a, "lora_B.weight": b}


def _bias(outputs: int, inputs: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    pair = _lora(outputs, inputs, rank, generator)
    return {**pair, "lora_B.bias": torch.randn(outputs, generator=generator) * _SIZE}


def _dora(outputs: int, inputs: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    pair = _lora(outputs, inputs, rank, generator)
    return {**pair, "dora_scale": 1 + _SIZE * torch.rand(outputs, 1, generator=generator)}


def _loha(outputs: int, inputs: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = {}
    for half, size in (("w1", _SIZE), ("w2", 1 / math.sqrt(inputs))):
        tensors[f"hada_{half}_a"] = torch.randn(outputs, rank, generator=generator) * size / math.sqrt(rank)
        tensors[f"hada_{half}_b"] = torch.randn(rank, inputs, generator=generator)
    return tensors


def _lokr(outputs: int, inputs: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    rows, columns = math.gcd(outputs, 4), math.gcd(inputs, 2)
    w1 = torch.randn(rows, columns, generator=generator) * _SIZE
    pair = _lora(outputs // rows, inputs // columns, rank, generator)
    return {
        "lokr_w1": w1,
        "lokr_w2_a": pair["lora_B.weight"] / (_SIZE * math.sqrt(columns)),
        "lokr_w2_b": pair["lora_A.weight"],
    }


def _full(outputs: int, inputs: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    difference = torch.randn(outputs, inputs, generator=generator) * _SIZE / math.sqrt(inputs)
    return {"diff": difference, "diff_b": torch.randn(outputs, generator=generator) * _SIZE}


_KINDS: Mapping[str, Callable[[int, int, int, torch.Generator], dict[str, Tensor]]] = {
    "lora": _lora,
    "bias": _bias,
    "dora": _dora,
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
}


def _linear_layers(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """The transformer's linear layers, by their name without prefix -> shape of the weight: (out, in)."""
    file = read_header(checkpoint)
    prefix = COMPONENTS["transformer"][0][0]
    return {
        name.removeprefix(prefix).removesuffix(".weight"): file.tensors[name].shape
        for name in module_names("transformer", file.tensors)
        if name.endswith(".weight") and len(file.tensors[name].shape) == 2
    }
