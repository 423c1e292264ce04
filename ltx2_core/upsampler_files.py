"""Upsampler files: what their headers say, and whether they belong to a model."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from .config.fields import ConfigError
from .config.upsampler import UpsamplerConfig
from .config.version import ModelVersion
from .file_kinds import UPSAMPLER
from .fits import latent_space, what_fits
from .loading.build import check
from .loading.checkpoint import Checkpoint, CheckpointError, read_header
from .shapes import VIDEO_SPACE_FACTOR, VIDEO_TIME_FACTOR, ClipShape
from .vae.upsampler import LatentUpsampler

_LOG = logging.getLogger("ltx2.engine")

_MARKS = ("initial_conv.weight", "initial_norm.weight", "final_conv.weight")
_FITTING = "choose an ltx-2*-spatial-upscaler or -temporal-upscaler file"


def read_upsampler(path: Path) -> tuple[Checkpoint, UpsamplerConfig]:
    """Read the header of an upsampler file and check every tensor's name and shape; no weights.

    Raises CheckpointError when the file is no upsampler or its tensors are not those of its configuration, and
    ConfigError for an upsampler of a kind that was never released; both name the file.
    """
    checkpoint = read_header(path)
    if not all(name in checkpoint.tensors for name in _MARKS):
        raise CheckpointError(
            f"{checkpoint.path}: this is not a latent upsampler; it looks like {checkpoint.looks_like()}: {_FITTING}"
        )
    try:
        # without metadata, as in converted files, the tensors say what it is
        described = "config" in checkpoint.metadata
        config = (
            UpsamplerConfig.from_config(checkpoint.config())
            if described
            else UpsamplerConfig.from_shapes(checkpoint.shapes)
        )
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.path}: {error}") from error
    check(build_upsampler(config), checkpoint, "upsampler")
    return checkpoint, config


def read_fitting_upsampler(
    path: Path, latent_channels: int, model_version_label: str
) -> tuple[Checkpoint, UpsamplerConfig]:
    """``read_upsampler`` and ``check_fits`` in one."""
    checkpoint, config = read_upsampler(path)
    stated = ModelVersion.from_metadata(checkpoint.metadata)
    check_fits(config, latent_channels, model_version_label, path.name, stated)
    return checkpoint, config


def build_upsampler(config: UpsamplerConfig) -> LatentUpsampler:
    """The upsampler without memory for its weights."""
    with torch.device("meta"):
        return LatentUpsampler(config)


def check_fits(
    config: UpsamplerConfig,
    latent_channels: int,
    model_version_label: str,
    file_name: str,
    stated: ModelVersion | None = None,
) -> None:
    """Raise ConfigError unless the upsampler was made for the model's latent space.

    latent_channels, model_version_label: the model's, as in 128 and "2.3". stated: the version in the upsampler file's
    metadata (``ModelVersion.from_metadata``); without one the log says that the version was not checked.
    """
    if config.latent_channels != latent_channels:
        raise ConfigError(
            f"{file_name}: this upsampler is for latents of {config.latent_channels} channels, but the model's have "
            f"{latent_channels}: choose the upsampler that was released with LTX-{model_version_label}"
        )
    if stated is None:
        _LOG.info(
            "%s (%s) does not say which version it is for; taken to fit LTX-%s. Versions 2.3 and 2.5 share their "
            "upsamplers, 2.0 has its own",
            file_name,
            config,
            model_version_label,
        )
        return
    model = ModelVersion.parse(model_version_label)
    assert model is not None, model_version_label
    if latent_space(stated) != latent_space(model):
        raise ConfigError(
            f"{file_name}: this upsampler is for LTX-{stated.label}, but the model is LTX-{model_version_label}: "
            f"choose {what_fits(UPSAMPLER, model)}"
        )


def upscaled(clip: ClipShape, config: UpsamplerConfig) -> ClipShape:
    """The clip that a latent upsampler makes of a clip."""
    frames, height, width = config.output_grid(*clip.grid)
    return ClipShape(
        (frames - 1) * VIDEO_TIME_FACTOR + 1,
        height * VIDEO_SPACE_FACTOR,
        width * VIDEO_SPACE_FACTOR,
        clip.fps * 2 if config.temporal else clip.fps,
    )
