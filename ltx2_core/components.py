"""The components of a model: which files fill which network, what stays packed, what can be streamed, what computes how."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..kernels.fp8_linear import has_units
from ..kernels.packed import UNPACK_BYTES
from .component import Component, NetworkFiles
from .config.numerics import in_eight_bits
from .config.upsampler import UpsamplerConfig
from .loading.build import Source, sources_of
from .loading.changes import Adapter, Adapters
from .loading.checkpoint import Checkpoint
from .loading.linear import PackedLinear
from .loading.lora.file import read_lora
from .loading.lora.report import Report, match
from .loading.lora.strength import Strength
from .loading.slot import multiplies
from .model_files import ModelFiles
from .model_spec import ModelSpec
from .networks import build_on_meta
from .text import encoder_files, gemma
from .text.vision import build_vision, fill_vision_buffers, read_vision
from .upsampler_files import build_upsampler

log = logging.getLogger("ltx2.engine")

# of a weight that is multiplied in float32: what its eight bits stand for, and its product with the scale
_WIDE_BYTES = 8


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
            finish=partial(_use_numerics, files.spec) if streams else lambda module: None,
            keeps_packed=lambda name: streams and name.startswith("blocks."),
            eight_bit=_eight_bit(files.spec) if streams else lambda name: False,
            blocks=lambda module: module.blocks if streams else (),
        ),
        device=files.spec.device,
        dtype=dtype,
        limit=files.spec.limit_bytes if streams else None,
    )


def _eight_bit(spec: ModelSpec) -> Callable[[str], bool]:
    """Which weights of the transformer are multiplied in eight bits where their format allows it."""
    return in_eight_bits if spec.numerics == "fp8" else lambda name: False


def _use_numerics(spec: ModelSpec, transformer: Any) -> None:
    """Have the transformer compute as the user chose, and say so."""
    transformer.use_numerics(spec.numerics)
    if spec.numerics != "fp8":
        log.info("the transformer computes with numerics %s", spec.numerics)
        return
    linears = [module for module in transformer.modules() if isinstance(module, nn.Linear | PackedLinear)]
    count = sum(isinstance(linear, PackedLinear) and linear.in_eight_bits for linear in linears)
    log.info(
        "the transformer computes with numerics fp8: %d of its linear layers in eight bits, %d as they are stored",
        count,
        len(linears) - count,
    )
    if not has_units(torch.device(spec.device)):
        log.warning(
            "%s multiplies no eight-bit numbers (NVIDIA GPUs do from compute capability 8.9 on): numerics fp8 computes in "
            "float32 there, on numbers that are unpacked at every use. It saves memory, not time",
            spec.device,
        )


def unpack_bytes(files: ModelFiles) -> int:
    """What unpacking the largest packed linear layer of the transformer holds at most."""
    eight_bit, wide = _eight_bit(files.spec), 0 if has_units(torch.device(files.spec.device)) else _WIDE_BYTES

    def for_each(source: Source) -> float:
        if eight_bit(source.name) and multiplies(source.weight):
            return wide
        return UNPACK_BYTES.get(source.weight.format, 0)

    sources = sources_of(files.of("transformer"), "transformer")
    return int(max(for_each(source) * math.prod(source.weight.shape) for source in sources))


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


def vision_component(files: ModelFiles, dtype: torch.dtype) -> Component[Any]:
    """The vision tower of the text encoder. Raises GemmaError where its files have none."""
    vision, device = read_vision(files.text_encoder), torch.device(files.spec.device)

    def build() -> nn.Module:
        with torch.device("meta"):
            return build_vision(vision)

    return Component(
        "vision tower",
        NetworkFiles(
            build,
            [Source(name, file, weight) for file, weight, name in vision.weights],
            finish=lambda module: fill_vision_buffers(module, device),
        ),
        device=files.spec.device,
        dtype=dtype,
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
