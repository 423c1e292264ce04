"""Tiny random upsamplers in exactly the released layouts, for the demo, tests and benchmarks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config.upsampler import UpsamplerConfig
from .loading.keymap import checkpoint_name
from .loading.write import write_checkpoint
from .upsampler_files import build_upsampler
from .vae.upsampler import binomial_kernel

_PLAIN = {"spatial_upsample": True, "temporal_upsample": False, "spatial_scale": 2.0, "rational_resampler": False}

# the release and what of its file's configuration sets it apart
_KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "2.0-spatial-x2": ("2.0", _PLAIN | {"rational_resampler": True}),
    "2.3-spatial-x2": ("2.3", _PLAIN),
    "2.3-spatial-x1.5": ("2.3", _PLAIN | {"spatial_scale": 1.5, "rational_resampler": True}),
    "2.3-temporal-x2": ("2.3", {"spatial_upsample": False, "temporal_upsample": True}),
}
KINDS = tuple(_KINDS)


def upsampler_file(kind: str) -> str:
    """Name of the tiny upsampler of a kind."""
    label, _, name = kind.partition("-")
    axis, _, scale = name.partition("-")
    return f"ltx-{label}-{axis}-upscaler-{scale}-tiny.safetensors"


def write_tiny_upsampler(path: Path, kind: str, latent_channels: int = 16) -> None:
    """Write an upsampler of one of ``KINDS`` with 64 inner channels; it states its version in the metadata.

    Raises ValueError for another kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"there is no tiny upsampler {kind!r}; choose {', '.join(KINDS)}")
    label, distinct = _KINDS[kind]
    config = {"in_channels": latent_channels, "num_blocks_per_stage": 4, "dims": 3, "mid_channels": 64, **distinct}
    module = build_upsampler(UpsamplerConfig.from_config(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        checkpoint_name("upsampler", name): _fill(name, tuple(empty.shape), generator)
        for name, empty in module.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, tensors, {"config": json.dumps(config), "model_version": f"{label}.0"})


def _fill(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values that keep activations and latents at a size of about one."""
    if name.endswith("blur_down.kernel"):
        return binomial_kernel().to(torch.bfloat16)
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        values = values / math.sqrt(math.prod(shape[1:]))
    else:
        values = 0.1 * values + (1 if "norm" in name and name.endswith(".weight") else 0)
    return values.to(torch.bfloat16)
