"""Tiny checkpoints in packed formats, for tests: the linear layers of a tiny checkpoint's blocks, packed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..kernels.fp8 import BLOCK, pack_fp8
from ..kernels.mxfp8 import pack_mxfp8
from ..kernels.nvfp4 import pack_nvfp4
from .config.version import TRANSFORMER_PREFIX
from .loading.checkpoint import read_header
from .loading.write import write_checkpoint

FORMATS = ("fp8", "fp8_row", "fp8_block", "fp8_e5m2", "fp8_cast", "mxfp8", "nvfp4")

# the linear layers that released packed files pack; gates, tables and norms stay as they are
_LAYERS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".net.0.proj", ".net.2")
_COMFY = {"fp8_e5m2": "float8_e5m2", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}


def write_tiny_packed(path: Path, checkpoint: Path, format: str, *, comfy_quant: bool = False) -> None:
    """Write a copy of a safetensors checkpoint with the linear layers of its transformer blocks in one format.

    comfy_quant: declare the format of every layer as ComfyUI does, instead of leaving it to names and dtypes. Raises
    ValueError for another format.
    """
    if format not in FORMATS or (comfy_quant and format == "fp8_cast"):
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}, or cannot be declared")
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(checkpoint).items():
        layer = name.removesuffix(".weight")
        if not (name.startswith(TRANSFORMER_PREFIX + "transformer_blocks.") and layer.endswith(_LAYERS)):
            tensors[name] = tensor
            continue
        tensors |= {layer + suffix: part for suffix, part in _packed(tensor, format).items()}
        if comfy_quant:
            text = json.dumps({"format": _COMFY.get(format, "float8_e4m3fn")})
            tensors[layer + ".comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, tensors, read_header(checkpoint).metadata)


def _packed(weight: Tensor, format: str) -> Mapping[str, Tensor]:
    """What follows the layer's name -> tensor."""
    rows, columns = weight.shape
    if format == "fp8_cast":
        return {".weight": weight.to(torch.float8_e4m3fn)}
    if format == "mxfp8":
        data, scale = pack_mxfp8(weight)
        return {".weight": data, ".weight_scale": scale}
    if format == "nvfp4":
        data, scale, scale_2 = pack_nvfp4(weight)
        return {".weight": data, ".weight_scale": scale, ".weight_scale_2": scale_2}
    shape = {"fp8_row": (rows, 1), "fp8_block": (-(-rows // BLOCK), -(-columns // BLOCK))}.get(format, ())
    dtype = torch.float8_e5m2 if format == "fp8_e5m2" else torch.float8_e4m3fn
    data, scale = pack_fp8(weight, torch.empty(shape), dtype)
    return {".weight": data, ".weight_scale": scale, ".input_scale": torch.tensor(0.5)}
