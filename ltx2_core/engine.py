"""The engine of one model on one device: encode prompts, sample, upscale, decode."""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import runs_fused
from .av import AV
from .component import Component
from .components import adapters_of, network_component, text_encoder_component, unpack_bytes, upsampler_component
from .condition_encoders import ModelEncoders
from .conditioning import state as tokens
from .conditioning.latent import AVLatent
from .conditioning.state import LatentState
from .config.version import ModelVersion
from .decoding import decode_video
from .enhancing import WORK_BYTES, enhance_prompt
from .evaluate import EVALUATIONS
from .graphs import WORTH_CAPTURING, can_capture
from .host import Progress, host
from .job import DecodedClip, SampleJob, check_latents, planned_passes, warn_of_guidance
from .memory_plan import MemoryPlan, plan_memory
from .memory_sizes import Needs, Room
from .model_files import ModelFiles
from .networks import FLOAT32_NETWORKS, NETWORKS
from .parallel.groups import Topology
from .parallel.topology import StageWork
from .phases import phase
from .preview import Previewer
from .ranks import ALONE, Ranks, Seat
from .sampling.denoise import Denoiser
from .sampling.guidance import GuidancePass, evaluation_mode
from .sampling.noise import SamplerNoise, noise_source, noised
from .sampling.samplers import SAMPLERS, evaluations
from .sampling.sigmas import check_sigmas
from .sampling.warm_up import warm_up
from .sampling_memory import WorkBytes, sampling_work_bytes
from .shapes import ClipShape
from .sound import SoundDecoding
from .stage import Stage
from .text import gemma
from .text.context import Context
from .text.enhance import EnhanceRequest
from .text.native import NativeText, split_conditioning
from .text.tokenizer import Tokenizer, load_tokenizer, tokenize
from .transformer.compiled import compiled, wants_compiling
from .transformer.model import Transformer
from .upsampler_files import check_fits, read_upsampler, upscaled
from .vae import tiling
from .vae.upsampler import upsample
from .vae.video_decoder import VideoDecoder

_LOG = logging.getLogger("ltx2.engine")

# Hidden states of a 1024-token prompt, their copies in the projection, and the encoder's own work.
_TEXT_WORK_BYTES = 2 << 30
# ComfyUI's planning figure for the latent upsamplers, per element of the result
_UPSAMPLER_BYTES_PER_ELEMENT = 3000


class LocalEngine:
    """Runs one model on one device in this process.

    Networks are read when first used and stay until the host asks for their memory.
    """

    _networks: dict[str, Component[Any]]
    _text_encoder: Component[Any]
    _ranks: Ranks

    def __init__(self, files: ModelFiles, base: LocalEngine | None = None, ranks: Ranks = ALONE):
        """base: the engine of the same files without LoRAs, whose networks this one uses with its own LoRAs.
        ranks: the processes that sample together, each with an engine like this.

        Raises LoraError for a LoRA that does not fit, before any weight is read.
        """
        self.files = files
        self.config = files.config
        self.device = torch.device(files.spec.device)
        self.dtype: torch.dtype = getattr(torch, files.spec.dtype)
        self._base = base
        self._ranks = ranks if base is None else base._ranks
        self._adapters, self.lora_report = adapters_of(files)
        if base is not None:
            self._networks, self._text_encoder = base._networks, base._text_encoder
            return
        self._networks = {name: network_component(files, name, self._dtype_of(name)) for name in NETWORKS}
        self._text_encoder = text_encoder_component(files, self.dtype)
        # the host keeps residents alive, so memory goes back when the last handle of this engine does
        weakref.finalize(self, _close_all, (*self._networks.values(), self._text_encoder))

    def start(self, *, together: bool = False) -> None:
        """Begin to read what comes first, in the background: what encodes prompts, then the transformer with its LoRAs.

        together: all ranks start now, and share what all of them read.
        """
        share = self._ranks.share if together else ALONE.share
        encoder, head, transformer = self._text_encoder, self._networks["text_head"], self._networks["transformer"]
        if self._ranks.rank:
            # prompts are for rank 0
            transformer.start(_TEXT_WORK_BYTES, self._adapters, share=share)
            return
        encoder.start(_TEXT_WORK_BYTES)
        # each has the disk and the link for itself: a prompt is encoded while the transformer is read
        head.start(_missing(encoder) + _TEXT_WORK_BYTES, after=encoder)
        spare = _missing(encoder, head) + 2 * _TEXT_WORK_BYTES
        transformer.start(spare, self._adapters, after=head, share=share)

    def wait_for_shared(self) -> None:
        """Return when the ranks have nothing under way that they read together: its exchanges go by the same devices."""
        self._networks["transformer"].wait_for_shared()

    def expect_loras(self) -> None:
        """Have this engine's LoRAs read together with the transformer, if that is being read."""
        self._networks["transformer"].want(self._adapters)

    def encode(self, prompt: str) -> Context:
        """Encode a prompt. Raises GemmaError or TokenizerError when the text encoder's folder is not usable."""
        with phase("text encoding", self.device), torch.no_grad():
            ids = tokenize(self._tokenizer, prompt)
            self.start()
            encoder = self._text_encoder.use(_TEXT_WORK_BYTES)
            layers = self.config.num_hidden_states - 1
            with host().progress(layers, "encoding the prompt") as progress:
                states, mask = gemma.hidden_states(encoder, ids, on_layer=progress.step)
            head = self._networks["text_head"].use(_TEXT_WORK_BYTES)
            return Context(head(states, mask).map(Tensor.cpu))

    def enhance(self, request: EnhanceRequest, write: Callable[..., str] = enhance_prompt) -> str:
        """A fuller prompt, written by the text encoder. Raises EnhanceError, GemmaError or TokenizerError.

        write: how, by this rank alone or by several (`enhancing_over_ranks.py`).
        """
        return write(self.files, self._text_encoder, self._tokenizer, request, self.dtype)

    def hold_text_encoder(self) -> None:
        """Have all of the text encoder on the device. Raises HostOutOfMemory where it does not fit."""
        self._text_encoder.use(WORK_BYTES, streamed=0)

    def encode_native(self, conditioning: Any) -> Context:
        """Turn a native CONDITIONING of LTX audio-video text into a context; raw ones pass through the connectors.

        Raises ConditioningError when it does not belong to this model.
        """
        return self.connect_native(split_conditioning(conditioning, self.config.text))

    def connect_native(self, text: NativeText) -> Context:
        """The context of what ``split_conditioning`` found."""
        parts = text.parts.map(lambda part: part.to(self.device, self.dtype))
        if text.mask is not None:
            head = self._networks["text_head"].use(_TEXT_WORK_BYTES)
            with torch.no_grad():
                parts = head.connect(parts, text.mask.to(self.device))
        return Context(parts.map(Tensor.cpu))

    def sample(self, job: SampleJob) -> AVLatent:
        """Sample a clip. Raises ValueError for a job that does not fit the model, before anything is loaded."""
        guidance, passes = job.effective_guidance, planned_passes(job, self.files)
        warn_of_guidance(passes, self.files.spec.checkpoint.name)
        # host floats that the device represents exactly: the sampler's arithmetic is float32
        sigmas = tuple(float(np.float32(sigma)) for sigma in check_sigmas(job.sigmas))
        with torch.no_grad():
            ranks = self._ranks
            states = ranks.agree(lambda: job.latent.conditioned(self._states(job.latent), ModelEncoders(self)))
            stage = Stage.of(job, states)
            mode, topology = self._division(job, stage, passes)
            work = self._work(stage, passes, mode, job.sampler.name, topology.ulysses)
            title = f"sampling, {len(sigmas) - 1} steps of {len(passes)} passes, {mode}"
            with phase(title, self.device), contextlib.ExitStack() as stage_ends:
                plan, model = ranks.agree(lambda: self._placed(job.latent.clip, work))
                # from here to the end no rank does anything by itself
                seat = stage_ends.enter_context(ranks.sampling(topology))
                x = noised(states, min(sigmas[0], 1.0), self._noise(job))
                states = states.map(_held)
                evaluate = EVALUATIONS[mode](
                    model,
                    states,
                    passes,
                    self._on_device(job.positive),
                    None if job.negative is None else self._on_device(job.negative),
                    seat.check,
                    graphed=self._worth_graphs(plan, evaluations(job.sampler.name, sigmas)),
                    parallel=seat.parallel,
                    groups=seat.groups,
                )
                if runs_fused(self.device):
                    warm_up(states, passes, guidance, job.sampler.name)
                noise = SamplerNoise(job.sampler, job.seed, self.device)
                with (
                    self._compiled(model, plan, seat),
                    host().progress(evaluations(job.sampler.name, sigmas), "sampling") as progress,
                ):
                    shown = partial(_show, progress, self._previewer(job.latent.clip, states))
                    denoise = Denoiser(seat.settled(evaluate), states, passes, guidance, on_evaluated=shown)
                    x = SAMPLERS[job.sampler.name](denoise, x, sigmas, noise, job.sampler, lambda *_: None)
                return self._result(job.latent, states, x)

    def upscale(self, latent: AVLatent, upsampler: Path) -> AVLatent:
        """Enlarge the video of a sampled latent in space or time; the sound stays as it is.

        Conditions belong to the old size and are left behind. Raises ValueError for a latent without content, and
        CheckpointError or ConfigError for an upsampler that is none or belongs to another version.
        """
        video = latent.latents.video
        if video is None:
            raise ValueError("this latent has no video yet: connect the sampler's output")
        check_latents(latent, self.config)
        checkpoint, config = read_upsampler(upsampler)
        stated = ModelVersion.from_metadata(checkpoint.metadata)
        label = self.files.version.label
        check_fits(config, self.config.video_vae.latent_channels, label, upsampler.name, stated)
        clip = upscaled(latent.clip, config)

        component = upsampler_component(checkpoint, config, self.device, self.dtype)
        with phase(f"upscaling, {config}", self.device), torch.no_grad():
            statistics = self._networks["video_decoder"].use(0).per_channel_statistics
            work = math.prod(video.shape[:2]) * clip.num_video_tokens * _UPSAMPLER_BYTES_PER_ELEMENT
            try:
                module = component.use(work)
                with host().progress(config.num_stages, "upscaling") as progress:
                    larger = upsample(module, statistics, video.to(self.device, self.dtype), progress.step)
            finally:
                component.close()
            return replace(
                latent, clip=clip, latents=AV(larger.float().cpu(), latent.latents.audio), masks=AV(), conditions=()
            )

    def decode(self, latent: AVLatent, tiling_choice: str, out: Tensor | None = None) -> DecodedClip:
        """Decode a sampled latent to frames and sound. Raises ValueError for one that was not sampled.

        out: memory for the frames, [B, F, H, W, 3] float32 on the CPU. Several ranks write their rows of it, and the
        last one has the sound.
        """
        video, audio = latent.latents.video, latent.latents.audio
        if (video is None and latent.streams.video) or (audio is None and latent.streams.audio):
            raise ValueError("this latent has no content yet: connect the sampler's output")
        check_latents(latent, self.config)
        frames = waveform = None
        with torch.no_grad():
            ranks = self._ranks.that_decode
            # the last rank's band is not the tallest
            sound = None if audio is None or ranks.rank < ranks.size - 1 else self._sound(audio)
            if video is not None:
                with phase("decoding video", self.device):
                    frames = self._decode_video(video, latent.clip, tiling_choice, sound, out)
            # of a sound that is decoded beside the video, what it took longer
            waveform = ranks.agree(lambda: None if sound is None else self._waveform(sound))
        return DecodedClip(frames, waveform, self.config.vocoder.sample_rate, latent.clip.fps)

    def close(self) -> None:
        """Give all memory back, also that of engines that differ in LoRAs only; a later use reads the weights again."""
        _close_all((*self._networks.values(), self._text_encoder))

    def device_bytes(self) -> int:
        """Bytes of weights on the device."""
        return sum(one.bytes_on(str(self.device)) for one in (*self._networks.values(), self._text_encoder))

    def _free_bytes(self) -> int | None:
        """What work can take: of free memory, and of the user's limit, without what is still being read."""
        device, ours = str(self.device), (*self._networks.values(), self._text_encoder)
        free, limit = host().free_bytes(device), self.files.spec.limit_bytes
        if limit is not None:
            held = sum(one.bytes_on(device) for one in ours)
            free = limit - held if free is None else min(free, limit - held)
        return None if free is None else max(free - sum(one.pending_bytes for one in ours), 0)

    def _dtype_of(self, network: str) -> torch.dtype:
        return torch.float32 if network in FLOAT32_NETWORKS else self.dtype

    def _on_device(self, context: Context) -> AV[Tensor]:
        return context.features.map(lambda features: features.to(self.device, self.dtype))

    # sampling ---------------------------------------------------------------------------------------------------

    def _states(self, latent: AVLatent) -> AV[LatentState]:
        clip, audio_vae = latent.clip, self.config.audio_vae
        batch = next((part.shape[0] for part in latent.latents.present()), 1)

        def placed(given: Tensor | None, *shape: int) -> Tensor:
            if given is None:
                return torch.zeros(batch, *shape, device=self.device, dtype=self.dtype)
            return given.to(self.device, self.dtype)

        def video() -> LatentState:
            latents = placed(latent.latents.video, self.config.video_vae.latent_channels, *clip.grid)
            return _masked(tokens.video_state(latents, clip), latent.masks.video, tokens.patchify_video)

        def audio() -> LatentState:
            shape = (audio_vae.latent_channels, clip.audio_latents, audio_vae.latent_mel_bins)
            latents = placed(latent.latents.audio, *shape)
            return _masked(tokens.audio_state(latents), latent.masks.audio, tokens.patchify_audio)

        return AV(video() if latent.streams.video else None, audio() if latent.streams.audio else None)

    def _previewer(self, clip: ClipShape, states: AV[LatentState]) -> Previewer | None:
        spec = host().wants_preview(self.config.video_vae.latent_channels)
        return None if spec is None or states.video is None else Previewer(spec, states.video, clip)

    def _noise(self, job: SampleJob) -> Callable[[AV[LatentState]], AV[Tensor]]:
        channels = self.config.audio_vae.latent_channels
        return noise_source(job.noise_layout, job.seed, self.device, audio_channels=channels)

    def _work(
        self, stage: Stage, passes: Sequence[GuidancePass], mode: str, sampler: str, ulysses: int
    ) -> Callable[[ClipShape], WorkBytes]:
        """Work space of a stage on one of ``ulysses`` ranks, for its clip and for others with the same conditions."""

        def work(clip: ClipShape) -> WorkBytes:
            return sampling_work_bytes(
                self.config.transformer,
                stage.tokens_of(clip),
                stage.text_tokens,
                batch=stage.batch,
                passes=len(passes),
                mode=mode,
                dtype=self.dtype,
                levels=stage.levels,
                biased=stage.biased,
                sampler=sampler,
                unpack_bytes=self._unpack_bytes,
                fused=runs_fused(self.device),
                eight_bit=self.files.spec.numerics == "fp8",
                ulysses=ulysses,
            )

        return work

    def _division(self, job: SampleJob, stage: Stage, passes: Sequence[GuidancePass]) -> tuple[str, Topology]:
        """How the passes are evaluated, and how the ranks share them: the same on all."""
        ranks, wanted, clip = self._ranks, self.files.spec.topology, job.latent.clip
        free = ranks.least(self._free_bytes())
        whole = self._work(stage, passes, "batched", job.sampler.name, ranks.size)
        batched_fits = free is None or whole(clip).reserved <= free
        # groups take passes apart
        apart = ranks.takes_passes_apart or not wanted.startswith(("auto", "1x"))
        choice = "split" if job.evaluation == "auto" and apart else job.evaluation
        mode = evaluation_mode(choice, len(passes), clip.num_video_tokens, batched_fits=batched_fits)
        sizes = StageWork(stage.tokens.video or 0, stage.text_tokens, self.config.transformer)
        return mode, ranks.topology(sizes, passes, wanted, batched=mode == "batched")

    def _placed(self, clip: ClipShape, work: Callable[[ClipShape], WorkBytes]) -> tuple[MemoryPlan | None, Transformer]:
        """Where everything lies during this run, and the transformer with this engine's LoRAs in its place."""
        plan = self._plan(clip, work)
        streamed = None if plan is None else plan.streamed_blocks
        transformer, share = self._networks["transformer"], self._ranks.share
        return plan, transformer.use(work(clip).reserved, self._adapters, streamed=streamed, share=share)

    def _plan(self, clip: ClipShape, work: Callable[[ClipShape], WorkBytes]) -> MemoryPlan | None:
        """What of the model lies where during this run, said in the log; None on the CPU, where nothing is streamed.

        Raises HostOutOfMemory with ways out when the run does not fit.
        """
        device, transformer = str(self.device), self._networks["transformer"]
        if self.device.type == "cpu":
            return None
        decoders = [self._networks[name] for name in ("video_decoder", "audio_decoder", "vocoder")]
        ours = {id(one): one for one in (self._text_encoder, *self._networks.values())}.values()
        needs = Needs(
            transformer=transformer.stack,
            text_encoder=self._text_encoder.stack,
            text_head=self._networks["text_head"].full_bytes,
            decoders=sum(one.full_bytes for one in decoders),
            clip=clip,
            encoding_work=_TEXT_WORK_BYTES,
            sampling=work,
            decoding=self._decode_plan,
            transformer_bits=transformer.bits,
            text_bits=self._text_encoder.bits,
        )
        needed = transformer.full_bytes + work(clip).reserved
        host().make_room({device: needed - transformer.bytes_on(device)})
        free = (host().free_bytes(device) or 0) + sum(one.bytes_on(device) for one in ours)
        host_free = (host().free_bytes("cpu") or 1 << 62) // self._ranks.size + transformer.bytes_on("cpu")
        room = Room(
            device=device,
            # all ranks plan alike, so that none waits for the streamed blocks of another
            free=self._ranks.least(free) or 0,
            host_free=self._ranks.least(host_free) or 0,
            budget=self.files.spec.limit_bytes,
            others={d: host().free_bytes(d) or 0 for d in host().compute_devices() if d not in (device, "cpu")},
        )
        plan = plan_memory(needs, room)
        _LOG.info("memory plan\n%s", plan)
        return plan

    def _compiled(self, model: Transformer, plan: MemoryPlan | None, seat: Seat) -> AbstractContextManager[None]:
        """Blocks that are compiled inside the context, where the user asked for it."""
        if not wants_compiling():
            return contextlib.nullcontext()
        if not _resident(plan) or seat.parallel.size > 1:
            _LOG.info("compile: not with streamed blocks, nor with ranks that share tokens, nor on the CPU")
            return contextlib.nullcontext()
        return compiled(model.blocks)

    def _worth_graphs(self, plan: MemoryPlan | None, evaluations: int) -> bool:
        """Whether that many evaluations are captured: blocks that are streamed change their place."""
        return _resident(plan) and evaluations >= WORTH_CAPTURING and can_capture(self.device)

    def _decode_plan(self, clip: ClipShape, free: int) -> tiling.TilePlan:
        shape = (1, self.config.video_vae.latent_channels, *clip.grid)
        return tiling.plan_decode(self.config.video_vae, shape, self.dtype.itemsize, free, "auto")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.files.text_encoder.tokenizer)

    @cached_property
    def _unpack_bytes(self) -> int:
        return unpack_bytes(self.files)

    def _result(self, latent: AVLatent, states: AV[LatentState], x: AV[Tensor]) -> AVLatent:
        target = x.map(lambda x, state: state.target(x).float().cpu(), states)
        unpatchify = AV(
            partial(tokens.unpatchify_video, grid=latent.clip.grid),
            partial(tokens.unpatchify_audio, channels=self.config.audio_vae.latent_channels),
        )
        sampled = target.map(lambda x, unpatchify: unpatchify(x), unpatchify)
        return replace(latent, latents=sampled, masks=AV(), conditions=())

    # decoding ---------------------------------------------------------------------------------------------------

    def _waveform(self, sound: SoundDecoding) -> Tensor:
        with phase("decoding sound", self.device):
            return sound.result()

    def _sound(self, audio: Tensor) -> SoundDecoding:
        return SoundDecoding(audio, self._networks["audio_decoder"], self._networks["vocoder"])

    def _decode_video(
        self, video: Tensor, clip: ClipShape, choice: str, sound: SoundDecoding | None, out: Tensor | None
    ) -> Tensor:
        """Frames [B * F, H, W, 3]; ``sound`` is decoded too where there is room for both."""
        ranks = self._ranks.that_decode
        decoder, free = ranks.agree(lambda: self._place_video_decoder(video, choice, sound))
        plan = self._plan_video(video, ranks.least(free), choice)
        frames = torch.empty(video.shape[0], clip.frames, clip.height, clip.width, 3) if out is None else out
        with (
            ranks.decoding(video.shape[3]) as (bands, check),
            host().progress(clip.frames, "decoding video") as progress,
        ):
            decode_video(decoder, video, plan, frames, bands=bands, sound=sound, on_frames=progress.to, check=check)
        return frames.flatten(0, 1)

    def _place_video_decoder(
        self, video: Tensor, choice: str, sound: SoundDecoding | None
    ) -> tuple[VideoDecoder, int | None]:
        """The decoder in its place, and the sound's networks where there is room for both; the bytes free for its work."""
        plan_for = partial(self._plan_video, video)
        component = self._networks["video_decoder"]
        self._networks["transformer"].rest()
        self._make_room_in_limit(component.full_bytes, plan_for)
        # the memory of the smallest stream is asked for; what is free beyond it makes the pieces longer
        least = plan_for(None, choice).work_bytes
        left = 0 if sound is None else sound.prepare(self._free_bytes(), component.missing_bytes + least)
        decoder = component.use(least + left)
        free = self._free_bytes()
        return decoder, None if free is None else free - left

    def _plan_video(self, video: Tensor, free: int | None, choice: str) -> tiling.TilePlan:
        """How all ranks decode latents in the bytes that are free on each."""
        shape, size = tuple(video.shape), self.dtype.itemsize
        return tiling.plan_decode(self.config.video_vae, shape, size, free, choice, ranks=self._ranks.that_decode.size)

    def _make_room_in_limit(self, decoder_bytes: int, plan_for: Callable[[int | None, str], tiling.TilePlan]) -> None:
        """Give up other weights where the user's limit would have the picture cut into tiles beside them."""
        if self.files.spec.limit_bytes is None:
            return
        for one in (self._text_encoder, self._networks["text_head"], self._networks["transformer"]):
            free = self._free_bytes()
            if free is None or plan_for(max(free - decoder_bytes, 0), "auto").tile is None:
                return
            one.release(str(self.device), None)


def _resident(plan: MemoryPlan | None) -> bool:
    """Whether all blocks lie on a GPU."""
    return plan is not None and not plan.streamed_blocks


def _show(progress: Progress, previewer: Previewer | None, x0: AV[Tensor]) -> None:
    if previewer is None:
        progress.step()
        return
    previewer.offer(x0.video)
    progress.step(picture=previewer.take())


def _held(state: LatentState) -> LatentState:
    """A frozen stream generates nothing, whatever its mask said when the noise was laid on."""
    return replace(state, mask=torch.zeros_like(state.mask)) if state.frozen else state


def _masked(state: LatentState, mask: Tensor | None, patchify: Callable[[Tensor], Tensor]) -> LatentState:
    if mask is None:
        return state
    levels = patchify(mask.to(state.mask)).expand(state.mask.shape)
    return replace(state, mask=levels.contiguous())


def _missing(*components: Component) -> int:
    """What components have still to take of their device."""
    return sum(one.full_bytes - one.bytes_on(one.device) for one in components)


def _close_all(components: tuple[Component, ...]) -> None:
    for component in components:
        component.close()
