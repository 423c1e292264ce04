import math

import numpy as np
import pytest
import torch
from ltx2_engine.ltx2_core.config.audio import AudioVAEConfig
from ltx2_engine.ltx2_core.testing import assert_close
from ltx2_engine.ltx2_core.vae.audio import encode_waveform, fit_latents
from ltx2_engine.ltx2_core.vae.mel import log_mel, mel_filter_bank
from ltx2_engine.ltx2_core.vae.resample import resample

CONFIG = AudioVAEConfig.from_config(
    {
        "audio_vae": {
            "model": {
                "params": {
                    "ddconfig": {"ch": 32, "z_channels": 2, "attn_resolutions": [], "mid_block_add_attention": False}
                }
            }
        }
    }
)


@pytest.fixture(scope="module")
def audio_utils():
    """transformers' NumPy front end."""
    return pytest.importorskip("transformers.audio_utils", reason="transformers is not installed")


def noise(*shape, seed=0):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_filter_bank_is_slaneys(audio_utils):
    want = audio_utils.mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    got = mel_filter_bank(CONFIG.mel)
    assert got.dtype == torch.float64
    # entries reach 0.02, so the tolerance is absolute
    assert np.abs(got.numpy() - want).max() < 1e-15


@pytest.mark.parametrize("samples", [513, 1600, 16001])
def test_log_mel_matches_transformers(audio_utils, samples):
    waveform = noise(2, 2, samples)
    waveform[1, 0] *= 1e-6  # near silence, where the floor acts
    filters = audio_utils.mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    want = [
        audio_utils.spectrogram(
            row.double().numpy(),
            audio_utils.window_function(1024, "hann", periodic=True),
            frame_length=1024,
            hop_length=160,
            fft_length=1024,
            power=1.0,
            center=True,
            pad_mode="reflect",
            mel_filters=filters,
            mel_floor=1e-5,
            log_mel="log",
        ).T
        for row in waveform.flatten(0, 1)
    ]
    got = log_mel(waveform, CONFIG)
    assert got.shape == (2, 2, 1 + samples // 160, 64)
    assert got.shape[2] == CONFIG.mel.num_frames(samples)
    assert got[1, 0].min() == pytest.approx(math.log(1e-5))
    assert_close(f"log-mel of {samples}", got.flatten(0, 1), torch.from_numpy(np.stack(want)), 1e-5)


def direct_resample(signal, from_hz, to_hz):
    """The windowed-sinc sum, one output sample at a time over all input samples, in float64."""
    divisor = math.gcd(from_hz, to_hz)
    o, n = from_hz // divisor, to_hz // divisor
    base = 0.99 * min(o, n)
    j = np.arange(len(signal))
    out = []
    for m in range(math.ceil(n * len(signal) / o)):
        t = (j / o - m / n) * base
        weight = np.where(np.abs(t) < 6, np.sinc(t) * np.cos(np.pi * t / 12) ** 2, 0.0) * base / o
        out.append(weight @ signal)
    return np.array(out)


@pytest.mark.parametrize(
    ("from_hz", "to_hz"),
    [(44100, 16000), (48000, 16000), (24000, 16000), (8000, 16000), (11025, 16000), (44056, 16000)],
)
def test_resampling_is_the_windowed_sinc_sum(from_hz, to_hz):
    signal = noise(2, 3, 1003, seed=1)
    got = resample(signal, from_hz, to_hz)
    want = np.stack([direct_resample(row, from_hz, to_hz) for row in signal.double().flatten(0, 1).numpy()])
    assert_close(f"{from_hz} to {to_hz}", got.flatten(0, 1), torch.from_numpy(want), 1e-6)


def test_resampling_keeps_a_tone_in_place():
    seconds = torch.arange(44100, dtype=torch.float64) / 44100
    got = resample(torch.sin(2 * math.pi * 440 * seconds).float(), 44100, 16000)
    want = torch.sin(2 * math.pi * 440 * torch.arange(16000, dtype=torch.float64) / 16000)
    assert_close("440 Hz away from the edges", got[100:-100], want[100:-100], 2e-3)


def test_equal_rates_leave_the_signal_alone():
    signal = noise(1, 2, 100)
    assert resample(signal, 48000, 48000) is signal


@pytest.mark.parametrize(("from_hz", "message"), [(0, "0 Hz"), (10**7, "10000000 Hz"), (44101, "common divisor")])
def test_impossible_rates_are_refused(from_hz, message):
    with pytest.raises(ValueError, match=message):
        resample(noise(1, 10), from_hz, 16000)


class Recorder(torch.nn.Module):
    """Stands in for the encoder and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Module()
        self.conv_in.conv = torch.nn.Conv2d(1, 1, 1)

    def forward(self, log_mel):
        self.log_mel = log_mel
        return log_mel


def test_mono_plays_on_both_sides_and_extra_channels_are_left_out():
    encoder = Recorder()
    waveform = noise(1, 6, 2000)
    encode_waveform(encoder, waveform[:, :1], 16000, CONFIG)
    assert torch.equal(encoder.log_mel, log_mel(waveform[:, [0, 0]], CONFIG))
    encode_waveform(encoder, waveform, 16000, CONFIG)
    assert torch.equal(encoder.log_mel, log_mel(waveform[:, [0, 1]], CONFIG))


def test_waveforms_are_resampled_before_the_transform():
    encoder = Recorder()
    waveform = noise(1, 2, 4800)
    encode_waveform(encoder, waveform, 48000, CONFIG)
    assert torch.equal(encoder.log_mel, log_mel(resample(waveform, 48000, 16000), CONFIG))


@pytest.mark.parametrize(
    ("shape", "rate", "message"),
    [((2, 2000), 16000, r"\[2, 2000\]"), ((1, 2, 0), 16000, "shape"), ((1, 2, 1500), 48000, "513")],
)
def test_unusable_waveforms_are_refused(shape, rate, message):
    with pytest.raises(ValueError, match=message):
        encode_waveform(Recorder(), noise(*shape), rate, CONFIG)


def test_latents_are_cropped_or_padded_at_the_end():
    latents = noise(1, 2, 5, 16)
    assert torch.equal(fit_latents(latents, 3), latents[:, :, :3])
    assert torch.equal(fit_latents(latents, 5), latents)
    longer = fit_latents(latents, 7)
    assert torch.equal(longer[:, :, :5], latents)
    assert longer.shape == (1, 2, 7, 16)
    assert not longer[:, :, 5:].any()
