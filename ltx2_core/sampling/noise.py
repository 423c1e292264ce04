"""Seeded noise. One generator per use; every draw is made whole, so it does not depend on how tokens are spread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...kernels import wide
from ..av import AV
from ..conditioning.state import LatentState, patchify_audio, patchify_video
from .choice import FOLLOW_NOISE_SEED, SamplerChoice

NOISE_LAYOUTS = ("ltx", "comfy")

# states -> standard normal tokens [B, T, C] of each; every call goes on in the same random stream
NoiseSource = Callable[[AV[LatentState]], AV[Tensor]]

# ltx-pipelines 1.2: keeps two streams that come from one seed from being the same numbers
_STREAM_OFFSET = 10000


def generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator on ``device``; the seed counts modulo 2^64, so -1 is 2^64 - 1 as in the reference."""
    return torch.Generator(device).manual_seed(seed % 2**64)


def finest_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def noise_source(layout: str, seed: int, device: torch.device, *, audio_channels: int) -> NoiseSource:
    """The source of starting noise of a layout in ``NOISE_LAYOUTS``; raises ValueError for another.

    ltx: drawn on ``device`` as the reference does. comfy: the noise that ComfyUI starts from at this seed.
    audio_channels: channels of the audio latent before its bins are folded into tokens.
    """
    if layout == "ltx":
        return TokenNoise(seed, device)
    if layout == "comfy":
        return ComfyNoise(seed, audio_channels)
    raise ValueError(f"there is no noise layout {layout!r}; choose {', '.join(NOISE_LAYOUTS)}")


class TokenNoise:
    """One draw a stream in token layout and latent dtype on the device, video first (ltx-core 1.2, GaussianNoiser).

    Conditioning tokens take part, so they change the noise of everything drawn after them.
    """

    def __init__(self, seed: int, device: torch.device):
        self._generator = generator(seed, device)

    def __call__(self, states: AV[LatentState]) -> AV[Tensor]:
        return states.map(lambda state: _draw(self._generator, state.latent, state.latent.dtype))


class ComfyNoise:
    """float32 draws on the CPU: the video latent [B, C, F, H, W], then the audio latent [B, C', T, M] (ComfyUI 0.33).

    Tokens appended by conditioning are drawn after both, video first, in token layout: they do not change the noise
    of the target. (ComfyUI appends guides to the latent and so changes the noise of a clip by adding one.)
    """

    def __init__(self, seed: int, audio_channels: int):
        self._generator = generator(seed, torch.device("cpu"))
        self._audio_channels = audio_channels

    def __call__(self, states: AV[LatentState]) -> AV[Tensor]:
        target = AV(
            None if states.video is None else self._video(states.video),
            None if states.audio is None else self._audio(states.audio),
        )
        return states.map(self._with_appended, target)

    def _video(self, state: LatentState) -> Tensor:
        batch, _, channels = state.latent.shape
        return patchify_video(torch.randn(batch, channels, state.num_target, generator=self._generator))

    def _audio(self, state: LatentState) -> Tensor:
        batch, _, width = state.latent.shape
        shape = (batch, self._audio_channels, state.num_target, width // self._audio_channels)
        return patchify_audio(torch.randn(shape, generator=self._generator))

    def _with_appended(self, state: LatentState, target: Tensor) -> Tensor:
        batch, tokens, width = state.latent.shape
        appended = torch.randn(batch, tokens - state.num_target, width, generator=self._generator)
        return torch.cat((target, appended), 1).to(state.latent.device)


def noised(states: AV[LatentState], noise_scale: float, source: NoiseSource) -> AV[Tensor]:
    """What sampling starts from: each stream's tokens moved towards noise, kept tokens as they are.

    A frozen stream is not moved, yet its noise is drawn (ltx-core 1.2, GaussianNoiser; both steps in float32).
    """
    return states.map(partial(_noised, noise_scale=noise_scale), source(states))


def _noised(state: LatentState, noise: Tensor, *, noise_scale: float) -> Tensor:
    scale = 0.0 if state.frozen else noise_scale
    x, clean = wide(state.latent), wide(state.clean)
    noisy = x + scale * (wide(noise) - x)
    return (clean + state.mask * (noisy - clean)).to(state.latent.dtype)


class SamplerNoise:
    """The fresh noise of one sampling run: a stream for steps, one for the midpoints inside them.

    Made anew for every run, on the latents' device. Seeds as in ltx-pipelines 1.2: steps take ``sde_seed``, or the
    noise seed + 10000 where it follows that; midpoints take the seed of the steps + 10000.
    """

    def __init__(self, choice: SamplerChoice, noise_seed: int, device: torch.device):
        seed = choice.sde_seed
        if seed == FOLLOW_NOISE_SEED:
            seed = noise_seed + _STREAM_OFFSET
        self._normalised = choice.noise_kind == "normalised"
        self._step = generator(int(seed), device)
        self._substep = generator(int(seed) + _STREAM_OFFSET, device)

    def step(self, x: AV[Tensor]) -> AV[Tensor]:
        """Noise [B, T, C] for each stream that ``x`` has, video first. Plain noise has x's dtype."""
        return x.map(partial(self._noise, self._step))

    def substep(self, x: AV[Tensor]) -> AV[Tensor]:
        """As ``step``, from the midpoints' stream."""
        return x.map(partial(self._noise, self._substep))

    def _noise(self, source: torch.Generator, x: Tensor) -> Tensor:
        if self._normalised:
            return normalised(_draw(source, x, finest_dtype(x.device)))
        return _draw(source, x, x.dtype)


def normalised(noise: Tensor) -> Tensor:
    """Mean 0 and deviation 1 (unbiased) over the whole tensor [B, T, C], then over each batch item."""
    noise = (noise - noise.mean()) / noise.std()
    return (noise - noise.mean((-2, -1), keepdim=True)) / noise.std((-2, -1), keepdim=True)


def _draw(source: torch.Generator, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.randn(like.shape, generator=source, dtype=dtype, device=like.device)
