"""The components of a model: which files fill which network, what stays packed, what can be streamed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from .component import Component, NetworkFiles
from .config.upsampler import UpsamplerConfig
from .loading.build import Source, sources_of
from .loading.changes import Adapter, Adapters
from .loading.checkpoint import Checkpoint
from .loading.lora.file import read_lora
from .loading.lora.report import Report, match
from .loading.lora.strength import Strength
from .model_files import ModelFiles
from .networks import build_on_meta
from .text import encoder_files, gemma
from .upsampler_files import build_upsampler


def adapters_of(files: ModelFiles) -> tuple[Adapters, Report | None]:
    """The model's LoRAs, and what they do to its transformer."""
    adapters = tuple(
        Adapter(read_lora(one.path), Strength(one.strength * one.video, one.strength * one.audio), one.parity)
        for one in files.spec.loras
    )
    if not adapters:
        return (), None
    shapes = {source.name: source.weight.shape for source in sources_of(files.of("transformer"), "transformer")}
    report = match(shapes, [(one.file, one.strength) for one in adapters], parity=adapters[0].parity)
    report.log()
    return adapters, report


def network_component(files: ModelFiles, name: str, dtype: torch.dtype) -> Component[Any]:
    streams = name == "transformer"
    return Component(
        name.replace("_", " "),
        NetworkFiles(
            partial(build_on_meta, name, files.config),
            sources_of(files.of(name), name),
            keeps_packed=lambda name: streams and name.startswith("blocks."),
            blocks=lambda module: module.blocks if streams else (),
        ),
        device=files.spec.device,
        dtype=dtype,
        limit=files.spec.limit_bytes if streams else None,
    )


def text_encoder_component(files: ModelFiles, dtype: torch.dtype) -> Component[Any]:
    encoder, device = files.text_encoder, torch.device(files.spec.device)

    def build() -> nn.Module:
        with torch.device("meta"):
            return encoder_files.build(encoder)

    return Component(
        "text encoder",
        NetworkFiles(
            build,
            [Source(name, file, weight) for file, weight, name in encoder.needed()],
            finish=lambda module: gemma.fill_buffers(module, device),
            keeps_packed=lambda name: name.startswith("layers."),
            blocks=lambda module: module.layers,
        ),
        device=files.spec.device,
        dtype=dtype,
        limit=files.spec.limit_bytes,
    )


def upsampler_component(
    checkpoint: Checkpoint, config: UpsamplerConfig, device: torch.device, dtype: torch.dtype
) -> Component[Any]:
    return Component(
        f"{config} upsampler",
        NetworkFiles(partial(_upsampler_on_meta, config), sources_of((checkpoint,), "upsampler")),
        device=str(device),
        dtype=dtype,
    )


def _upsampler_on_meta(config: UpsamplerConfig) -> nn.Module:
    with torch.device("meta"):
        return build_upsampler(config)
