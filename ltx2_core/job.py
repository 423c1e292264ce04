"""What the engine is asked for and what it answers, and whether a request fits the model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor

from .av import AV
from .conditioning.keyframe import GeneratedKeyframes
from .conditioning.latent import AVLatent
from .config.model import ModelConfig
from .model_files import ModelFiles
from .presets import EVALUATIONS, NOISE_LAYOUTS
from .sampling.choice import SamplerChoice
from .sampling.guidance import GuidancePass, StreamGuidance, plan_passes
from .sampling.samplers import NEEDS_UNCOND
from .text.context import Context

_LOG = logging.getLogger("ltx2.engine")


@dataclass(frozen=True)
class SampleJob:
    """What to sample. ``negative`` is needed when a cfg other than 1 is set, and by CFG++.

    sigmas: falling noise levels from at most 1. seed: of the starting noise.
    evaluation: ``auto``, ``split`` or ``batched`` passes. noise_layout: ``ltx`` or ``comfy`` starting noise.
    """

    latent: AVLatent
    positive: Context
    negative: Context | None
    guidance: AV[StreamGuidance]
    sigmas: tuple[float, ...]
    sampler: SamplerChoice
    seed: int
    evaluation: str = "auto"
    noise_layout: str = "ltx"

    @property
    def effective_guidance(self) -> AV[StreamGuidance]:
        """The strengths of the streams that there are; without a second stream there is nothing to isolate from."""
        streams = self.latent.streams
        alone = not (streams.video and streams.audio)

        def effective(guidance: StreamGuidance) -> StreamGuidance:
            return guidance.without_modality() if alone else guidance

        return streams.map(lambda there, guidance: effective(guidance) if there else None, self.guidance)


@dataclass(frozen=True)
class DecodedClip:
    """frames: [F, H, W, 3] float32 in 0..1. waveform: [B, 2, N] float32 in -1..1. On the CPU; ``None`` for a stream
    that the clip does not have."""

    frames: Tensor | None = field(repr=False)
    waveform: Tensor | None = field(repr=False)
    sample_rate: int
    fps: float


def planned_passes(job: SampleJob, files: ModelFiles) -> tuple[GuidancePass, ...]:
    """The passes of a job, which is checked. Raises ValueError for one that does not fit the model."""
    passes = plan_passes(job.effective_guidance, force_uncond=job.sampler.name in NEEDS_UNCOND)
    check_job(job, passes, files.config, files.version.label)
    return passes


def warn_of_guidance(passes: tuple[GuidancePass, ...], checkpoint: str) -> None:
    """Say so where a distilled checkpoint is guided."""
    if len(passes) > 1 and "distilled" in checkpoint.lower():
        _LOG.warning(
            "%s is a distilled checkpoint, made to run without guidance: %d passes a step take longer and over-saturate. "
            "Choose the guider's preset distilled.",
            checkpoint,
            len(passes),
        )


def check_job(job: SampleJob, passes: tuple[GuidancePass, ...], config: ModelConfig, label: str) -> None:
    """Raise ValueError for a job that does not fit the model, before anything is loaded."""
    if job.negative is None and any(one.negative for one in passes):
        reason = f"{job.sampler.name} needs" if job.sampler.name in NEEDS_UNCOND else "cfg other than 1 needs"
        raise ValueError(f"{reason} a negative prompt: connect one, or set video_cfg and audio_cfg to 1")
    for name, value, choices in (
        ("evaluation", job.evaluation, EVALUATIONS),
        ("noise layout", job.noise_layout, NOISE_LAYOUTS),
    ):
        if value not in choices:
            raise ValueError(f"there is no {name} {value!r}; choose {', '.join(choices)}")
    for context in (job.positive, job.negative):
        if context is not None and context.widths != _context_widths(config):
            raise ValueError(
                f"this prompt was encoded for another model: its features are {context.widths} wide (video, audio), "
                f"this LTX-{label} model takes {_context_widths(config)}. Encode the prompt with this model."
            )
    _check_guidance(job.guidance, config, label)
    check_latents(job.latent, config)
    job.latent.check_conditions()
    marked = any(isinstance(one, GeneratedKeyframes) for one in job.latent.conditions)
    if marked and not config.transformer.keyframe_marker:
        raise ValueError(f"generated keyframes need LTX-2.5; this is LTX-{label}")


def check_latents(latent: AVLatent, config: ModelConfig) -> None:
    """Raise ValueError for latents of another model or of another size than their clip."""
    video, audio = latent.latents.video, latent.latents.audio
    channels, audio_vae, grid = config.video_vae.latent_channels, config.audio_vae, latent.clip.grid
    reflects = config.video_vae.decoder.padding_mode == "reflect"
    if latent.streams.video and reflects and min(grid[1:]) < 2:
        raise ValueError(
            f"{latent.clip.width}x{latent.clip.height} is too small: this model decodes 64x64 pixels or more"
        )
    if video is not None and (video.ndim != 5 or tuple(video.shape[1:]) != (channels, *grid)):
        raise ValueError(
            f"video latents are {list(video.shape)}; this model and clip need [batch, {channels}, "
            f"{', '.join(map(str, grid))}]"
        )
    needed = (audio_vae.latent_channels, audio_vae.latent_mel_bins)
    if audio is not None and (audio.ndim != 4 or (audio.shape[1], audio.shape[3]) != needed):
        raise ValueError(
            f"audio latents are {list(audio.shape)}; this model needs [batch, {needed[0]}, T, {needed[1]}]"
        )
    if video is not None and audio is not None and video.shape[0] != audio.shape[0]:
        raise ValueError(f"there are {video.shape[0]} videos and {audio.shape[0]} sounds; their number must be equal")


def _context_widths(config: ModelConfig) -> tuple[int, int]:
    captions, streams = config.transformer.caption_channels, config.transformer.streams
    return (streams.video.context_dim, streams.audio.context_dim) if captions is None else (captions, captions)


def _check_guidance(guidance: AV[StreamGuidance], config: ModelConfig, label: str) -> None:
    blocks = config.transformer.num_layers
    for one in guidance.present():
        wrong = [block for block in one.stg_blocks if not 0 <= block < blocks]
        if one.uses_stg and wrong:
            raise ValueError(f"stg_blocks {wrong} do not exist: this model has blocks 0 to {blocks - 1}")
    # of 48 blocks the releases were tuned for one each
    usual = (29,) if label == "2.0" else (28,)
    other = {(28,), (29,)} - {usual}
    if any(one.uses_stg and one.stg_blocks in other for one in guidance.present()):
        _LOG.warning("stg_blocks %s are for another version: LTX-%s was tuned for block %d", *other, label, usual[0])
