"""Encoders that stand in for the networks: averages of pixels, and latents that count."""

import math

import pytest
import torch
import torch.nn.functional as F

CHANNELS = 8


class AveragingEncoders:
    """Video latents are the cells' mean colours in three channels of eight; audio latents hold their index."""

    default_crf = 0

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype
        self.seen = []

    def video(self, pixels):
        self.seen.append(pixels)
        assert pixels.dtype == torch.float32
        cells = F.avg_pool3d(pixels, (1, 32, 32))
        if cells.shape[2] > 1:
            cells = torch.cat((cells[:, :, :1], cells[:, :, 1:].unflatten(2, (-1, 8)).mean(3)), 2)
        return F.pad(cells, (0, 0, 0, 0, 0, 0, 0, CHANNELS - 3), value=0.5).to(self.dtype)

    def audio(self, waveform, sample_rate):
        self.seen.append(waveform)
        mel_frames = 1 + math.ceil(waveform.shape[-1] * 16000 / sample_rate) // 160
        count = math.ceil(mel_frames / 4)
        return torch.arange(1, count + 1).view(1, 1, -1, 1).expand(1, 2, -1, 4).to(self.dtype)


@pytest.fixture
def encoders():
    return AveragingEncoders()


@pytest.fixture
def bf16_encoders():
    return AveragingEncoders(torch.bfloat16)
