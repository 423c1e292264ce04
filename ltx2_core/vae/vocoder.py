"""Vocoders: stereo log-mel to a stereo waveform."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config.audio import MEL_BINS, BandwidthExtensionConfig, VocoderConfig
from .mel import LOG_FLOOR
from .vocoder_generator import Generator


class Vocoder(nn.Module):
    """What turns [B, 2, M, 64] log-mel into [B, 2, samples_per_mel_frame * M] in [-1, 1].

    ``Vocoder(config)`` makes the kind that the configuration describes, as ``pathlib.Path`` does: their checkpoints
    have different trees, so they are two classes. Weights are to be loaded in float32 whatever the file stores: in
    bfloat16 the spectrum is audibly worse (ltx-core 1.2).
    """

    def __new__(cls, config: VocoderConfig) -> Vocoder:
        return super().__new__(GeneratorVocoder if config.bandwidth_extension is None else ExtendedVocoder)


class GeneratorVocoder(Vocoder, Generator):
    """A generator alone (24 kHz)."""

    def __init__(self, config: VocoderConfig):
        Generator.__init__(self, config.generator)


class ExtendedVocoder(Vocoder):
    """A 16 kHz generator and a second one that adds the band up to 24 kHz (48 kHz)."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        extension = config.bandwidth_extension
        assert extension is not None
        self.ratio = extension.ratio
        self.vocoder = Generator(config.generator)
        self.bwe_generator = Generator(extension.generator)
        self.mel_stft = CausalLogMel(extension)

    def forward(self, log_mel: Tensor, on_stage: Callable[[], None] | None = None) -> Tensor:
        """log_mel: [B, 2, M, 64]. Returns [B, 2, 480 * M]. on_stage: called after each stage; may raise."""
        narrow = self.vocoder(log_mel, on_stage)
        detail = self.bwe_generator(self.mel_stft(narrow), on_stage)
        return (detail + upsample_smooth(narrow, self.ratio)).clamp(-1, 1)


class CausalLogMel(nn.Module):
    """Log-mel whose frame sees only samples up to its own end, with transform and filters from the checkpoint."""

    mel_basis: Tensor

    def __init__(self, config: BandwidthExtensionConfig):
        super().__init__()
        self.hop_length = config.hop_length
        self.stft_fn = FourierBases(config.n_fft)
        self.register_buffer("mel_basis", torch.empty(MEL_BINS, config.n_fft // 2 + 1))

    def forward(self, waveform: Tensor) -> Tensor:
        """[B, 2, N] -> [B, 2, N / hop_length, 64]; N must be a multiple of the hop length."""
        assert waveform.shape[-1] % self.hop_length == 0, (waveform.shape, self.hop_length)
        basis = self.stft_fn.forward_basis
        signal = F.pad(waveform.flatten(0, 1)[:, None], (basis.shape[-1] - self.hop_length, 0))
        real, imaginary = F.conv1d(signal, basis, stride=self.hop_length).chunk(2, dim=1)
        magnitude = (real.square() + imaginary.square()).sqrt()
        mel = (self.mel_basis @ magnitude).clamp(min=LOG_FLOOR).log()
        return mel.transpose(1, 2).unflatten(0, waveform.shape[:2])


class FourierBases(nn.Module):
    """Windowed Fourier bases, real rows before imaginary ones: [n_fft + 2, 1, n_fft]."""

    forward_basis: Tensor
    inverse_basis: Tensor

    def __init__(self, n_fft: int):
        super().__init__()
        self.register_buffer("forward_basis", torch.empty(n_fft + 2, 1, n_fft))
        # no inverse transform happens here, but the checkpoint has the tensor and loading is strict
        self.register_buffer("inverse_basis", torch.empty(n_fft + 2, 1, n_fft))


def upsample_smooth(waveform: Tensor, ratio: int) -> Tensor:
    """Raise the sample rate by a whole ratio with a Hann-windowed sinc (width 6, rolloff 0.99; ltx-core 1.2).

    [B, C, N] -> [B, C, ratio * N]. Not ``resample``: the edges repeat and the filter has another phase.
    """
    width = math.ceil(6 / 0.99)
    taps = 2 * width * ratio + 1
    t = (torch.arange(taps, dtype=torch.float64) / ratio - width) * 0.99
    kernel = torch.sinc(t) * torch.cos(t.clamp(-6, 6) * (math.pi / 12)).square() * 0.99
    signal = F.pad(waveform.flatten(0, 1)[:, None], (width, width), mode="replicate")
    out = F.conv_transpose1d(signal, kernel.to(waveform)[None, None], stride=ratio)
    left = 2 * width * ratio
    return out[..., left : left + ratio * waveform.shape[-1]].reshape(*waveform.shape[:2], -1)
