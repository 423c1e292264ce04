"""Band-limited change of a waveform's sample rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99
_RATE_RANGE_HZ = (1_000, 768_000)
# 256 MiB of float64; every common pair of rates needs less than a hundredth of it
_MAX_KERNEL_SIZE = 1 << 25


def resample(waveform: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Resample with a Hann-windowed sinc, as torchaudio's default does (``sinc_interp_hann``, width 6, rolloff 0.99).

    waveform: [..., N], float. Returns [..., ceil(N * to_hz / from_hz)] in the same dtype.
    Raises ValueError for rates outside 1 to 768 kHz and for pairs with so small a common divisor that the filter
    would not fit.
    """
    low, high = _RATE_RANGE_HZ
    if not low <= min(from_hz, to_hz) <= max(from_hz, to_hz) <= high:
        raise ValueError(f"cannot resample {from_hz} Hz to {to_hz} Hz: use rates from {low} to {high} Hz")
    if from_hz == to_hz:
        return waveform

    divisor = math.gcd(from_hz, to_hz)
    stride, phases = from_hz // divisor, to_hz // divisor
    kernel, margin = _kernels(stride, phases)
    num_samples = waveform.shape[-1]
    signal = F.pad(waveform.reshape(-1, 1, num_samples), (margin, margin + stride))
    out = F.conv1d(signal, kernel.to(waveform)[:, None], stride=stride)  # [rows, phases, steps]
    out = out.transpose(1, 2).flatten(1)[:, : math.ceil(phases * num_samples / stride)]
    return out.reshape(*waveform.shape[:-1], -1)


def _kernels(stride: int, phases: int) -> tuple[Tensor, int]:
    """One filter per output phase, [phases, 2 * margin + stride] in float64, and the margin in input samples."""
    cutoff = _ROLLOFF * min(stride, phases)
    margin = math.ceil(_ZERO_CROSSINGS * stride / cutoff)
    taps = 2 * margin + stride
    if phases * taps > _MAX_KERNEL_SIZE:
        raise ValueError(
            f"cannot resample by {phases}/{stride}: the two rates have too small a common divisor. "
            f"Convert the sound to a common rate such as 44100 or 48000 Hz first."
        )
    position = torch.arange(-margin, margin + stride, dtype=torch.float64) / stride
    phase = torch.arange(phases, dtype=torch.float64)[:, None] / phases
    t = ((position - phase) * cutoff).clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = torch.cos(t * (math.pi / (2 * _ZERO_CROSSINGS))).square()
    return torch.sinc(t) * window * (cutoff / stride), margin
