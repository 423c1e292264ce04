"""Log-mel spectrogram that the audio encoder reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config.audio import AudioVAEConfig, MelConfig

LOG_FLOOR = 1e-5


def log_mel(waveform: Tensor, config: AudioVAEConfig) -> Tensor:
    """Natural logarithm of the mel magnitudes of a centred STFT (reflected edges, periodic Hann window).

    waveform: [B, 2, N] at ``config.sample_rate``, float; N > n_fft / 2.
    Returns [B, 2, 1 + N // hop_length, mel_bins] in float32.
    """
    mel = config.mel
    window = torch.hann_window(mel.n_fft, dtype=torch.float32, device=waveform.device)
    spectrum = torch.stft(
        waveform.float().flatten(0, 1),
        mel.n_fft,
        mel.hop_length,
        window=window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    magnitude = spectrum.abs().transpose(1, 2)  # [B * 2, M, n_fft / 2 + 1]
    filters = mel_filter_bank(mel).to(magnitude)
    return (magnitude @ filters).clamp(min=LOG_FLOOR).log().unflatten(0, waveform.shape[:2])


def mel_filter_bank(mel: MelConfig) -> Tensor:
    """Triangles of unit area, equally spaced on the Slaney mel scale: [n_fft / 2 + 1, mel_bins] in float64."""
    low, high = _mel_from_hz(mel.min_hz), _mel_from_hz(mel.max_hz)
    corners = _hz_from_mel(torch.linspace(low, high, mel.mel_bins + 2, dtype=torch.float64))
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    bins = torch.arange(mel.n_fft // 2 + 1, dtype=torch.float64)[:, None] * (mel.sample_rate / mel.n_fft)
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0) * (2 / (right - left))


# Slaney, Auditory Toolbox (1998): linear below 1 kHz (mel 15), logarithmic above
_MEL_PER_HZ = 3 / 200
_KNEE_HZ, _KNEE_MEL = 1000.0, 15.0
_LOG_STEP = math.log(6.4) / 27


def _mel_from_hz(hz: float) -> float:
    return hz * _MEL_PER_HZ if hz < _KNEE_HZ else _KNEE_MEL + math.log(hz / _KNEE_HZ) / _LOG_STEP


def _hz_from_mel(mel: Tensor) -> Tensor:
    return torch.where(mel < _KNEE_MEL, mel / _MEL_PER_HZ, _KNEE_HZ * torch.exp((mel - _KNEE_MEL) * _LOG_STEP))
