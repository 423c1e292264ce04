"""The engine of one model on one device: encode prompts, sample, decode."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .av import AV
from .component import Component
from .conditioning import state as tokens
from .conditioning.latent import AVLatent
from .conditioning.state import LatentState
from .evaluate import batched_evaluate
from .host import host
from .loading.build import component_bytes, load_component
from .loading.checkpoint import read_tensors
from .model_files import ModelFiles
from .model_spec import ModelSpec
from .networks import FLOAT32_NETWORKS, NETWORKS, build_on_meta
from .phases import phase
from .presets import default_image_crf
from .sampling.denoise import Denoiser
from .sampling.guidance import StreamGuidance, plan_passes
from .sampling.noise import generator, noised
from .sampling.samplers import SAMPLERS, SamplerChoice
from .sampling.sigmas import check_sigmas
from .shapes import ClipShape
from .text import gemma
from .text.context import Context
from .text.native import split_conditioning
from .text.tokenizer import load_tokenizer, tokenize
from .vae import tiling

_LOG = logging.getLogger("ltx2.engine")

# Widths of a token's activations that live at once in a block: the feed-forward's hidden tokens decide.
_LIVE_WIDTHS = 14
# Hidden states of a 1024-token prompt, their copies in the projection, and the encoder's own work.
_TEXT_WORK_BYTES = 2 << 30
_AUDIO_WORK_BYTES = 1 << 30
# The reference draws the decoder's noise from the run's generator; a fixed seed keeps decoding repeatable by itself.
_DECODER_NOISE_SEED = 42


@dataclass(frozen=True)
class SampleJob:
    """What to sample. ``negative`` is needed when a strength other than 1 is set for cfg.

    sigmas: falling noise levels from at most 1.
    """

    latent: AVLatent
    positive: Context
    negative: Context | None
    guidance: AV[StreamGuidance]
    sigmas: tuple[float, ...]
    sampler: SamplerChoice
    seed: int


@dataclass(frozen=True)
class DecodedClip:
    """frames: [F, H, W, 3] float32 in 0..1. waveform: [B, 2, N] float32 in -1..1. Both on the CPU."""

    frames: Tensor = field(repr=False)
    waveform: Tensor = field(repr=False)
    sample_rate: int
    fps: float


class LocalEngine:
    """Runs one model on one device in this process.

    Networks are read when first used and stay until the host asks for their memory.
    """

    def __init__(self, files: ModelFiles):
        self.files = files
        self.config = files.config
        self.device = torch.device(files.spec.device)
        self.dtype = getattr(torch, files.spec.dtype)
        self._networks: dict[str, Component[Any]] = {
            name: _network(files, name, self._dtype_of(name)) for name in NETWORKS
        }
        self._text_encoder: Component[Any] = _text_encoder(files, self.dtype)
        components = (*self._networks.values(), self._text_encoder)
        # the host keeps residents alive, so memory goes back when the last handle of this engine does
        weakref.finalize(self, _close_all, components)

    def encode(self, prompt: str) -> Context:
        """Encode a prompt. Raises GemmaError or TokenizerError when the text encoder's folder is not usable."""
        with phase("text encoding", self.device), torch.no_grad():
            ids = tokenize(load_tokenizer(self.files.spec.text_encoder), prompt)
            encoder = self._text_encoder.use(_TEXT_WORK_BYTES)
            layers = self.config.num_hidden_states - 1
            with host().progress(layers, "encoding the prompt") as progress:
                states, mask = gemma.hidden_states(encoder, ids, on_layer=progress.step)
            head = self._networks["text_head"].use(_TEXT_WORK_BYTES)
            return Context(head(states, mask).map(Tensor.cpu))

    def encode_native(self, conditioning: Any) -> Context:
        """Turn a native CONDITIONING of LTX audio-video text into a context; raw ones pass through the connectors.

        Raises ConditioningError when it does not belong to this model.
        """
        text = split_conditioning(conditioning, self.config.text)
        parts = text.parts.map(lambda part: part.to(self.device, self.dtype))
        if text.mask is not None:
            head = self._networks["text_head"].use(_TEXT_WORK_BYTES)
            with torch.no_grad():
                parts = head.connect(parts, text.mask.to(self.device))
        return Context(parts.map(Tensor.cpu))

    def sample(self, job: SampleJob) -> AVLatent:
        """Sample a clip. Raises ValueError for a job that does not fit the model, before anything is loaded."""
        passes = plan_passes(job.guidance)
        self._check(job, needs_negative=any(one.negative for one in passes))
        # host floats that the device represents exactly: the sampler's arithmetic is float32
        sigmas = tuple(float(np.float32(sigma)) for sigma in check_sigmas(job.sigmas))
        with torch.no_grad():
            images = self._encode_images(job.latent)
            with phase(f"sampling, {len(sigmas) - 1} steps of {len(passes)} passes", self.device):
                states = self._states(job.latent, images)
                model = self._networks["transformer"].use(self._sampling_bytes(states, len(passes)))
                evaluate = batched_evaluate(
                    model,
                    states,
                    passes,
                    self._on_device(job.positive),
                    None if job.negative is None else self._on_device(job.negative),
                    host().check_interrupt,
                )
                denoise = Denoiser(evaluate, states, passes, job.guidance)
                x = noised(states, min(sigmas[0], 1.0), generator(job.seed, self.device))
                with host().progress(len(sigmas) - 1, "sampling") as progress:
                    x = SAMPLERS[job.sampler.name](denoise, x, sigmas, lambda *_: progress.step())
                return self._result(job.latent, states, x)

    def decode(self, latent: AVLatent, tiling_choice: str) -> DecodedClip:
        """Decode a sampled latent to frames and sound. Raises ValueError for one that was not sampled."""
        video, audio = latent.latents.video, latent.latents.audio
        if video is None or audio is None:
            raise ValueError("this latent has no content yet: connect the sampler's output")
        self._check_latents(latent)
        with torch.no_grad():
            with phase("decoding video", self.device):
                frames = self._decode_video(video, latent.clip, tiling_choice)
            with phase("decoding sound", self.device):
                waveform = self._decode_audio(audio)
        return DecodedClip(frames, waveform, self.config.vocoder.sample_rate, latent.clip.fps)

    def close(self) -> None:
        """Give all memory back; a later use reads the weights again."""
        _close_all((*self._networks.values(), self._text_encoder))

    def _dtype_of(self, network: str) -> torch.dtype:
        return torch.float32 if network in FLOAT32_NETWORKS else self.dtype

    def _on_device(self, context: Context) -> AV[Tensor]:
        return context.features.map(lambda features: features.to(self.device, self.dtype))

    # sampling ---------------------------------------------------------------------------------------------------

    def _check(self, job: SampleJob, *, needs_negative: bool) -> None:
        if needs_negative and job.negative is None:
            raise ValueError(
                "cfg other than 1 needs a negative prompt: connect one, or set video_cfg and audio_cfg to 1"
            )
        streams = self.config.transformer.streams
        widths = (
            (self.config.transformer.caption_channels,) * 2
            if self.config.transformer.caption_channels is not None
            else (streams.video.context_dim, streams.audio.context_dim)
        )
        for context in (job.positive, job.negative):
            if context is not None and context.widths != widths:
                raise ValueError(
                    f"this prompt was encoded for another model: its features are {context.widths} wide (video, audio), "
                    f"this LTX-{self.files.version.label} model takes {widths}. Encode the prompt with this model."
                )
        blocks = self.config.transformer.num_layers
        for guidance in job.guidance.present():
            wrong = [block for block in guidance.stg_blocks if not 0 <= block < blocks]
            if guidance.uses_stg and wrong:
                raise ValueError(f"stg_blocks {wrong} do not exist: this model has blocks 0 to {blocks - 1}")
        self._check_latents(job.latent)

    def _check_latents(self, latent: AVLatent) -> None:
        video, audio = latent.latents.video, latent.latents.audio
        channels, audio_vae = self.config.video_vae.latent_channels, self.config.audio_vae
        if video is not None and (video.ndim != 5 or tuple(video.shape[1:]) != (channels, *latent.clip.grid)):
            raise ValueError(
                f"video latents are {list(video.shape)}; this model and clip need [batch, {channels}, "
                f"{', '.join(map(str, latent.clip.grid))}]"
            )
        needed = (audio_vae.latent_channels, audio_vae.latent_mel_bins)
        if audio is not None and (audio.ndim != 4 or (audio.shape[1], audio.shape[3]) != needed):
            raise ValueError(
                f"audio latents are {list(audio.shape)}; this model needs [batch, {needed[0]}, T, {needed[1]}]"
            )
        if video is not None and audio is not None and video.shape[0] != audio.shape[0]:
            raise ValueError(
                f"there are {video.shape[0]} videos and {audio.shape[0]} sounds; their number must be equal"
            )

    def _encode_images(self, latent: AVLatent) -> list[Tensor]:
        if not latent.conditions:
            return []
        default_crf = default_image_crf(self.files.version)
        cells = latent.clip.latent_height * latent.clip.latent_width
        work = 80 * 7 * cells * 1024 * self.dtype.itemsize  # ComfyUI's planning figure for an encode of few frames
        with phase("encoding images", self.device):
            encoder = self._networks["video_encoder"].use(work)
            return [
                encoder(condition.pixels(latent.clip, default_crf).to(self.device, self.dtype))
                for condition in latent.conditions
            ]

    def _states(self, latent: AVLatent, images: list[Tensor]) -> AV[LatentState]:
        clip, audio_vae = latent.clip, self.config.audio_vae
        batch = next((part.shape[0] for part in latent.latents.present()), 1)
        empty = AV(
            (batch, self.config.video_vae.latent_channels, *clip.grid),
            (batch, audio_vae.latent_channels, clip.audio_latents, audio_vae.latent_mel_bins),
        )
        video, audio = (
            torch.zeros(shape, device=self.device, dtype=self.dtype)
            if given is None
            else given.to(self.device, self.dtype)
            for given, shape in (
                (latent.latents.video, empty.video),
                (latent.latents.audio, empty.audio),
            )
        )
        states = AV(
            _masked(tokens.video_state(video, clip), latent.masks.video, tokens.patchify_video),
            _masked(tokens.audio_state(audio), latent.masks.audio, tokens.patchify_audio),
        )
        for condition, image in zip(latent.conditions, images, strict=True):
            states = AV(condition.apply(states.video, image), states.audio)
        return states

    def _sampling_bytes(self, states: AV[LatentState], num_passes: int) -> int:
        widths = self.config.transformer.streams
        per_pass = sum(
            math.prod(state.latent.shape[:2]) * stream.dim
            for state, stream in zip(states.present(), widths.present(), strict=True)
        )
        return per_pass * num_passes * _LIVE_WIDTHS * self.dtype.itemsize

    def _result(self, latent: AVLatent, states: AV[LatentState], x: AV[Tensor]) -> AVLatent:
        target = x.map(lambda x, state: state.target(x).float().cpu(), states)
        sampled = AV(
            tokens.unpatchify_video(target.video, latent.clip.grid),
            tokens.unpatchify_audio(target.audio, self.config.audio_vae.latent_channels),
        )
        return replace(latent, latents=sampled, masks=AV(), conditions=())

    # decoding ---------------------------------------------------------------------------------------------------

    def _decode_video(self, video: Tensor, clip: ClipShape, choice: str) -> Tensor:
        plan_for = partial(tiling.plan_decode, self.config.video_vae, tuple(video.shape), self.dtype.itemsize)
        component = self._networks["video_decoder"]
        # the memory of a stream is asked for; what is free beyond it decides whether the clip decodes at once
        decoder = component.use(plan_for(None, choice).work_bytes)
        plan = plan_for(host().free_bytes(str(self.device)), choice)
        _LOG.info("decoding video %s", plan)
        latents = video.to(self.device, self.dtype)
        frames = torch.empty(video.shape[0], clip.frames, clip.height, clip.width, 3)
        done = 0
        with host().progress(clip.frames, "decoding video") as progress:
            conditioned = self.config.video_vae.decoder.timestep_conditioning
            noise = generator(_DECODER_NOISE_SEED, self.device) if conditioned else None
            for chunk in tiling.decode(decoder, latents, plan, lambda count, _: progress.to(count), noise=noise):
                picture = ((chunk.float() + 1) / 2).clamp(0, 1)
                frames[:, done : done + chunk.shape[2]] = picture.permute(0, 2, 3, 4, 1).cpu()
                done += chunk.shape[2]
        assert done == clip.frames, f"decoded {done} of {clip.frames} frames"
        return frames.flatten(0, 1)

    def _decode_audio(self, audio: Tensor) -> Tensor:
        decoder = self._networks["audio_decoder"].use(_AUDIO_WORK_BYTES)
        vocoder = self._networks["vocoder"].use(_AUDIO_WORK_BYTES)
        with host().progress(1, "decoding sound") as progress:
            mel = decoder(audio.to(self.device, torch.float32), on_stage=host().check_interrupt)
            waveform = vocoder(mel, on_stage=host().check_interrupt).float().cpu()
            progress.step()
        return waveform


def _masked(state: LatentState, mask: Tensor | None, patchify: Callable[[Tensor], Tensor]) -> LatentState:
    if mask is None:
        return state
    levels = patchify(mask.to(state.mask)).expand(state.mask.shape)
    return replace(state, mask=levels.contiguous())


def _network(files: ModelFiles, name: str, dtype: torch.dtype) -> Component[nn.Module]:
    def load(on_bytes: Callable[[int], None]) -> nn.Module:
        module = build_on_meta(name, files.config)
        return load_component(module, files.checkpoint, name, device=files.spec.device, dtype=dtype, on_bytes=on_bytes)

    return Component(
        name.replace("_", " "),
        device=files.spec.device,
        weight_bytes=files.elements(name) * dtype.itemsize,
        file_bytes=component_bytes(files.checkpoint, name),
        load=load,
    )


def _text_encoder(files: ModelFiles, dtype: torch.dtype) -> Component[nn.Module]:
    def load(on_bytes: Callable[[int], None]) -> nn.Module:
        with torch.device("meta"):
            module = gemma.build_gemma(files.text_config)
        state: dict[str, Tensor] = {}
        for file in files.text_weights:
            wanted = {name: own for name in file.tensors if (own := gemma.module_name(name)) is not None}
            for name, tensor in read_tensors(file, wanted, device=files.spec.device, dtype=dtype, on_bytes=on_bytes):
                state[wanted[name]] = tensor
        gemma.assign(module, state, source=str(files.spec.text_encoder))
        gemma.fill_buffers(module, torch.device(files.spec.device))
        return module.requires_grad_(False).train(False)

    return Component(
        "text encoder",
        device=files.spec.device,
        weight_bytes=files.text_elements * dtype.itemsize,
        file_bytes=sum(file.size_bytes for file in files.text_weights),
        load=load,
    )


def _close_all(components: tuple[Component, ...]) -> None:
    for component in components:
        component.close()


_engines: weakref.WeakValueDictionary[ModelSpec, LocalEngine] = weakref.WeakValueDictionary()


def open_engine(spec: ModelSpec) -> LocalEngine:
    """The engine of these files on this device; the one that is already there, if any handle still holds it."""
    engine = _engines.get(spec)
    if engine is None:
        _engines[spec] = engine = LocalEngine(ModelFiles.read(spec))
    return engine


@dataclass(frozen=True)
class ModelHandle:
    """What an LTX2_MODEL link carries: a reference to an engine, no weights of its own."""

    spec: ModelSpec
    engine: LocalEngine = field(repr=False, compare=False)

    @property
    def label(self) -> str:
        return self.engine.files.version.label

    def __str__(self) -> str:
        return f"LTX-{self.label} ({self.spec.checkpoint.name}, {self.spec.dtype}, {self.spec.device})"


@dataclass(frozen=True)
class Guider:
    """What an LTX2_GUIDER link carries: a model, its prompts and how strongly to guide."""

    model: ModelHandle
    positive: Context
    negative: Context | None
    guidance: AV[StreamGuidance]
