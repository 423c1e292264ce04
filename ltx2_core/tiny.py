"""Tiny random checkpoints in exactly the released layout, for the demo, tests and benchmarks.

They make noise, not pictures; every code path of a real model runs on them in seconds.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config.model import ModelConfig
from .config.released import released_config
from .file_kinds import AUDIO_VAE, CONNECTORS, PROJECTION, TRANSFORMER, VIDEO_VAE, VOCODER, part_of
from .loading.keymap import checkpoint_name
from .loading.write import write_checkpoint
from .networks import NETWORKS, build_on_meta
from .text.tiny_gemma import GEMMA4_VERSION, write_tiny_gemma, write_tiny_gemma4
from .tiny_lora import write_tiny_lora
from .tiny_upsampler import upsampler_file, write_tiny_upsampler
from .vae.mel import mel_filter_bank

LABELS = ("2.0", "2.3", "2.5")
TEXT_ENCODER = "gemma-3-tiny"
BUNDLE = "gemma4-tiny-with-proj-ltx-2.5.safetensors"

_GEMMA_WIDTH, _GEMMA_LAYERS = 64, 6
_WIDTH, _AUDIO_WIDTH, _HEADS = 128, 64, 4
_LATENT_CHANNELS, _AUDIO_CHANNELS, _AUDIO_BASE = 16, 2, 32

_TRANSFORMER = {
    "num_layers": 3,
    "num_attention_heads": _HEADS,
    "attention_head_dim": _WIDTH // _HEADS,
    "audio_num_attention_heads": _HEADS,
    "audio_attention_head_dim": _AUDIO_WIDTH // _HEADS,
    "in_channels": _LATENT_CHANNELS,
    "out_channels": _LATENT_CHANNELS,
    "audio_in_channels": _AUDIO_BASE,
    "audio_out_channels": _AUDIO_BASE,
    "cross_attention_dim": _WIDTH,
    "audio_cross_attention_dim": _AUDIO_WIDTH,
    "caption_channels": _GEMMA_WIDTH,
    "connector_num_layers": 2,
}


# file of the split layout -> its folder, the parts it holds, and the sections of the configuration it carries
_SPLIT = {
    "transformer": ("diffusion_models", (TRANSFORMER, CONNECTORS), ("transformer",)),
    "video-vae": ("vae", (VIDEO_VAE,), ("vae",)),
    "audio-vae": ("vae", (AUDIO_VAE, VOCODER), ("audio_vae", "vocoder")),
    "text-projection": ("text_encoders", (PROJECTION,), ()),
}
LAYOUTS = ("full", "split")

# LTX-2.5 was released as separate files, with the text projection in the text encoder's
_SPLIT_ONLY = "2.5"


def checkpoint_file(label: str) -> str:
    """Name of the tiny checkpoint of a version."""
    return f"ltx-{label}-tiny.safetensors"


def split_file(label: str, kind: str) -> str:
    """Name, with its folder, of one file of the split layout: transformer, video-vae, audio-vae, text-projection."""
    return f"{_SPLIT[kind][0]}/ltx-{label}-tiny-{kind}.safetensors"


def write_tiny_set(root: Path, label: str = "2.3", layout: str | None = None) -> list[Path]:
    """Write what a two-stage recipe needs for one version below the model folder ``root``.

    layout: ``full`` for one checkpoint, ``split`` for one file a component, as ``write_tiny_split`` makes them; None as
    the version was released. Returns these, the text encoder, a LoRA and a spatial x2 upsampler. Raises ValueError for
    another version or layout.
    """
    if label not in LABELS:
        raise ValueError(f"there is no tiny set of version {label!r}; choose {', '.join(LABELS)}")
    layouts = LAYOUTS if label != _SPLIT_ONLY else ("split",)
    layout = layout or layouts[0]
    if layout not in layouts:
        raise ValueError(f"there is no layout {layout!r} of version {label}; choose {' or '.join(layouts)}")
    if layout == "split":
        model = write_tiny_split(root, label)
    else:
        model = [root / "checkpoints" / checkpoint_file(label)]
        write_tiny_checkpoint(model[0], label)
    encoder = root / "text_encoders" / (BUNDLE if label == _SPLIT_ONLY else TEXT_ENCODER)
    encoder.parent.mkdir(parents=True, exist_ok=True)
    if label == _SPLIT_ONLY:
        write_tiny_gemma4(encoder, hidden_size=_GEMMA_WIDTH, num_layers=_GEMMA_LAYERS)
    else:
        write_tiny_gemma(encoder, hidden_size=_GEMMA_WIDTH, num_layers=_GEMMA_LAYERS)
    lora = root / "loras" / f"ltx-{label}-lora-tiny.safetensors"
    write_tiny_lora(lora, model[0])
    kind = "2.0-spatial-x2" if label == "2.0" else "2.3-spatial-x2"
    upsampler = root / "latent_upscale_models" / upsampler_file(kind)
    write_tiny_upsampler(upsampler, kind, _LATENT_CHANNELS)
    return [*model, encoder, lora, upsampler]


def write_tiny_checkpoint(path: Path, label: str, seed: int = 0) -> None:
    """Write one checkpoint: a whole model for 2.0 and 2.3, the transformer file with its connectors for 2.5."""
    tensors, config = tiny_model(label, seed)
    if label == "2.5":
        _write_part(path, "transformer", label, tensors, config)
    else:
        _write(path, label, tensors, config)


def write_tiny_split(root: Path, label: str, seed: int = 0) -> list[Path]:
    """Write the model of ``write_tiny_checkpoint`` as one file a component below the model folder ``root``.

    The weights are the same, bit for bit. Returns transformer (with connectors), video VAE, audio VAE (with vocoder) and,
    except for 2.5, text projection.
    """
    tensors, config = tiny_model(label, seed)
    kinds = [kind for kind in _SPLIT if (label, kind) != (_SPLIT_ONLY, "text-projection")]
    paths = {kind: root / split_file(label, kind) for kind in kinds}
    for kind, path in paths.items():
        _write_part(path, kind, label, tensors, config)
    return list(paths.values())


def tiny_model(label: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a whole tiny model by their checkpoint names, and its configuration."""
    config = tiny_config(label)
    model = ModelConfig.from_config(config, _GEMMA_LAYERS + 1, ())
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for network in NETWORKS:
        for name, empty in build_on_meta(network, model).state_dict().items():
            key = checkpoint_name(network, name)
            if key not in tensors:
                tensors[key] = _fill(key, tuple(empty.shape), model, generator)
    return tensors, config


def _write_part(path: Path, kind: str, label: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    _, parts, sections = _SPLIT[kind]
    held = {name: tensor for name, tensor in tensors.items() if part_of(name) in parts}
    _write(path, label, held, {section: config[section] for section in sections})


def _write(path: Path, label: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"model_version": f"{label}.0"}
    if config:
        metadata["config"] = json.dumps(config)
    if label == _SPLIT_ONLY and "transformer" in config:
        metadata["gemma_source_checkpoint"] = json.dumps({"ltx_version": f"{label}.0", "gemma_version": GEMMA4_VERSION})
    write_checkpoint(path, tensors, metadata)


def tiny_config(label: str) -> dict[str, Any]:
    """The released configuration of a version with every width and depth shrunk."""
    if label not in LABELS:
        raise ValueError(f"there is no tiny checkpoint of version {label!r}; choose {', '.join(LABELS)}")
    config = released_config(label)
    config["transformer"] |= _TRANSFORMER | _connectors(label)
    config["vae"] |= {
        "latent_channels": _LATENT_CHANNELS,
        "encoder_base_channels": _LATENT_CHANNELS,
        "decoder_base_channels": _LATENT_CHANNELS,
        "encoder_blocks": _one_layer(config["vae"]["encoder_blocks"]),
        "decoder_blocks": _one_layer(config["vae"]["decoder_blocks"]),
    }
    config["audio_vae"]["model"]["params"]["ddconfig"] |= {"ch": _AUDIO_BASE, "z_channels": _AUDIO_CHANNELS}
    vocoder = config["vocoder"]
    for generator in (vocoder["vocoder"], vocoder["bwe"]) if "bwe" in vocoder else (vocoder,):
        generator["upsample_initial_channel"] = 64
    return config


def _connectors(label: str) -> dict[str, int]:
    if label == "2.0":  # both connectors share the text encoder's width
        return {"connector_num_attention_heads": _HEADS, "connector_attention_head_dim": _GEMMA_WIDTH // _HEADS}
    return {
        "connector_num_attention_heads": _HEADS,
        "connector_attention_head_dim": _WIDTH // _HEADS,
        "audio_connector_num_attention_heads": _HEADS,
        "audio_connector_attention_head_dim": _AUDIO_WIDTH // _HEADS,
    }


def _one_layer(blocks: list[Any]) -> list[Any]:
    return [[name, {**params, "num_layers": 1} if name == "res_x" else params] for name, params in blocks]


# weights -------------------------------------------------------------------------------------------------------------


def _fill(key: str, shape: tuple[int, ...], model: ModelConfig, generator: torch.Generator) -> Tensor:
    """Values for one tensor: fixed ones for filters and bases, random ones that keep activations in range elsewhere."""
    fixed = _fixed(key, shape, model)
    if fixed is not None:
        return fixed.reshape(shape).to(torch.bfloat16)
    if len(shape) == 5:
        return _smooth_kernel(key, shape, generator).to(torch.bfloat16)
    values = torch.randn(shape, generator=generator)
    last = key.rsplit(".", 1)[-1]
    if "scale_shift_table" in last:
        return values * 0.1  # float32, as released
    if last == "std-of-means" or key.endswith(("q_norm.weight", "k_norm.weight")):
        values = 1 + 0.1 * values
    elif len(shape) <= 1 or last in ("keyframes_abs_pos_embedding", "mean-of-means"):
        values = 0.05 * values
    elif last != "learnable_registers":
        values = values * _gain(key) / math.sqrt(_fan_in(key, shape))
    return values.to(torch.bfloat16)


def _fixed(key: str, shape: tuple[int, ...], model: ModelConfig) -> Tensor | None:
    last = key.rsplit(".", 1)[-1]
    if key.endswith("timestep_scale_multiplier"):
        return torch.tensor(916.0)
    if last == "filter":
        half = torch.tensor([0.002029, 0.009389, -0.025543, -0.057657, 0.128573, 0.443210])
        return torch.cat((half, half.flip(0)))
    if last in ("forward_basis", "inverse_basis"):
        return _fourier_basis(shape[-1])
    if last == "mel_basis":
        mel = replace(model.audio_vae.mel, n_fft=2 * (shape[1] - 1))
        return mel_filter_bank(mel).T
    return None


def _fourier_basis(n_fft: int) -> Tensor:
    """Hann-windowed transform, real rows before imaginary ones: [n_fft + 2, n_fft]."""
    phase = 2 * math.pi / n_fft * torch.outer(torch.arange(n_fft // 2 + 1.0), torch.arange(float(n_fft)))
    return torch.cat((phase.cos(), -phase.sin())) * torch.hann_window(n_fft)


def _fan_in(key: str, shape: tuple[int, ...]) -> int:
    if ".ups." in key:  # a transposed convolution: [in, out, kernel], of which a stride reaches each sample
        return shape[0] * 2
    return math.prod(shape[1:])


def _gain(key: str) -> float:
    """Quiet residual branches and output layers, so that the demo's sound has a level and does not clip."""
    for part, gain in (("bwe_generator.conv_post", 0.02), ("conv_post", 0.15), (".convs2.", 0.2)):
        if part in key:
            return gain
    return 1.0


def _smooth_kernel(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A video convolution [out, in, 3, 3, 3] that mixes channels and blurs.

    Sub-pixels of an up-sampler share their mix, so that the demo's picture has shapes in place of static.
    """
    sub_pixels = _sub_pixels(key, shape)
    mix = torch.randn(shape[0] // sub_pixels, shape[1], generator=generator).repeat_interleave(sub_pixels, 0)
    blur = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.einsum("oi,t,y,x->oityx", mix, blur, blur, blur)
    gain = 0.3 if ".conv2." in key else 1.5
    return gain * (kernel + 0.02 * torch.randn(shape, generator=generator)) / math.sqrt(shape[1])


def _sub_pixels(key: str, shape: tuple[int, ...]) -> int:
    if key.startswith("vae.decoder.conv_out."):
        return 16
    if key.startswith("vae.decoder.up_blocks.") and ".res_blocks." not in key:
        # the released up-samplers: all axes (multiplier 1 and 2), space, time
        return {8: 8, 4: 8, 2: 4, 1: 2}[shape[0] // shape[1]]
    return 1
