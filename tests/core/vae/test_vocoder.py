import math

import numpy as np
import pytest
import torch
from ltx2_engine.ltx2_core.config.audio import VocoderConfig
from ltx2_engine.ltx2_core.testing import assert_close
from ltx2_engine.ltx2_core.vae.vocoder import Vocoder, upsample_smooth

BLOCKS = {"resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3, "stereo": True}
BIGVGAN = {
    **BLOCKS,
    "resblock": "AMP1",
    "activation": "snakebeta",
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
}
MAIN_KERNELS, MAIN_RATES = [11, 4, 4, 4, 4, 4], [5, 2, 2, 2, 2, 2]
BWE_KERNELS, BWE_RATES = [12, 11, 4, 4, 4], [6, 5, 2, 2, 2]
RAW = {
    "plain": {
        "vocoder": {
            **BLOCKS,
            "resblock": "1",
            "upsample_initial_channel": 64,
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [16, 15, 8, 4, 4],
        }
    },
    "extended": {
        "vocoder": {
            "vocoder": {
                **BIGVGAN,
                "upsample_initial_channel": 64,
                "upsample_rates": MAIN_RATES,
                "upsample_kernel_sizes": MAIN_KERNELS,
            },
            "bwe": {
                **BIGVGAN,
                "upsample_initial_channel": 64,
                "upsample_rates": BWE_RATES,
                "upsample_kernel_sizes": BWE_KERNELS,
                "apply_final_activation": False,
                "input_sampling_rate": 16000,
                "output_sampling_rate": 48000,
                "hop_length": 80,
                "n_fft": 512,
                "win_size": 512,
                "num_mels": 64,
            },
        }
    },
}
KINDS = list(RAW)
# so that a good part of the samples clips, and the sums before it stay near 1
LOUD = {"plain": 10.0, "extended": 2.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of tiny operations: threads that wait for each other cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_value(name, tensor, seed):
    value = randn(*tensor.shape, seed=seed)
    if name.endswith("filter"):
        return 1 / 12 + 0.1 * value  # not symmetric, so that a mirrored filter shows
    if name.endswith("mel_basis"):
        return 0.01 * value.abs()
    if name.endswith("_basis"):
        return 0.05 * value
    if tensor.ndim == 1:
        return 0.2 * value
    fan_in = tensor.shape[0] * tensor.shape[2] if ".ups." in f".{name}" else tensor[0].numel()
    return value / fan_in**0.5


def tiny(kind, output_gain=1.0):
    vocoder = Vocoder(VocoderConfig.from_config(RAW[kind]))
    for i, (name, tensor) in enumerate(vocoder.state_dict().items()):
        tensor.copy_(random_value(name, tensor, seed=i))
        if name.endswith("conv_post.weight"):
            tensor.mul_(output_gain)
    return vocoder.requires_grad_(False).train(False)


def load_diffusers(kind, vocoder):
    module = pytest.importorskip("diffusers.pipelines.ltx2.vocoder", reason="diffusers is not installed")
    if kind == "plain":
        theirs = module.LTX2Vocoder(hidden_channels=64)
    else:
        # the published conversion leaves out the clamp of the 16 kHz stage that ltx-core has
        theirs = module.LTX2VocoderWithBWE(hidden_channels=64, bwe_hidden_channels=64, final_act_fn="clamp")
    renames = [
        ("ups.", "upsamplers."),
        ("resblocks", "resnets"),
        ("conv_pre", "conv_in"),
        ("conv_post", "conv_out"),
        ("act_post", "act_out"),
        ("downsample.lowpass", "downsample"),
    ]
    state = {}
    for name, tensor in vocoder.state_dict().items():
        for ours, their in renames:
            name = name.replace(ours, their)
        state[name] = tensor
    theirs.load_state_dict(state, strict=True)
    return theirs.requires_grad_(False).train(False)


def load_ltx_core(kind, vocoder):
    module = pytest.importorskip("ltx_core.model.audio_vae", reason="ltx-core is not installed")
    theirs = module.VocoderConfigurator.from_config(RAW[kind])
    theirs.load_state_dict(vocoder.state_dict(), strict=True)
    return theirs.requires_grad_(False).train(False)


LOADERS = {"diffusers": load_diffusers, "ltx-core": load_ltx_core}


def stage_outputs(vocoder, log_mel, names):
    """Outputs of the named submodules, in order of execution, then the waveform."""
    outputs = []
    hooks = [
        vocoder.get_submodule(name).register_forward_hook(lambda module, args, out: outputs.append(out))
        for name in names
    ]
    outputs.append(vocoder(log_mel))
    for hook in hooks:
        hook.remove()
    return outputs


def log_mel_of(frames):
    return randn(2, 2, frames, 64, seed=100) * 1.5 - 2


@pytest.mark.reference
@pytest.mark.parametrize("frames", [1, 3, 10])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("oracle", LOADERS)
def test_waveform_matches(oracle, kind, frames):
    vocoder = tiny(kind, output_gain=0.01)
    want = LOADERS[oracle](kind, vocoder)(log_mel_of(frames))
    assert 1e-3 < want.abs().max() < 0.99, "the final activation must not hide errors"
    got = vocoder(log_mel_of(frames))
    scale = 1 / want.abs().max()
    assert_close(f"{oracle} {kind} {frames}", got * scale, want * scale, 1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("oracle", LOADERS)
def test_clipping_matches(oracle, kind):
    vocoder = tiny(kind, output_gain=LOUD[kind])
    want = LOADERS[oracle](kind, vocoder)(log_mel_of(3))
    assert (want.abs() > 0.999).float().mean() > 0.1, "this test is about loud sound"
    assert_close(f"{oracle} {kind} loud", vocoder(log_mel_of(3)), want, 1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_matches_ltx_core(kind):
    vocoder = tiny(kind)
    generators = [("", 5)] if kind == "plain" else [("vocoder.", 6), ("bwe_generator.", 5)]
    names = []
    for prefix, stages in generators:
        names += [f"{prefix}conv_pre", *(f"{prefix}ups.{i}" for i in range(stages)), f"{prefix}conv_post"]
    got = stage_outputs(vocoder, log_mel_of(3), names)
    want = stage_outputs(load_ltx_core(kind, vocoder), log_mel_of(3), names)
    assert len(got) == len(want) == len(names) + 1
    for name, a, b in zip([*names, "waveform"], got, want, strict=True):
        scale = 1 / b.abs().max()
        assert_close(f"{kind} {name}", a * scale, b * scale, 1e-5)


@pytest.mark.parametrize(("kind", "samples"), [("plain", 240), ("extended", 480)])
def test_length_is_as_the_config_says(kind, samples):
    waveform = tiny(kind)(log_mel_of(4))
    assert waveform.shape == (2, 2, 4 * samples)
    assert samples == VocoderConfig.from_config(RAW[kind]).samples_per_mel_frame


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_spectrograms_give_float32_sound(kind):
    vocoder = tiny(kind)
    log_mel = log_mel_of(2).bfloat16()
    got = vocoder(log_mel)
    assert got.dtype == torch.float32
    assert torch.equal(got, vocoder(log_mel.float()))


@pytest.mark.parametrize(("kind", "stages"), [("plain", 5), ("extended", 11)])
def test_decoding_can_be_interrupted_between_stages(kind, stages):
    calls = []
    vocoder = tiny(kind)
    vocoder(log_mel_of(1), on_stage=lambda: calls.append(None))
    assert len(calls) == stages

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        vocoder(log_mel_of(1), on_stage=stop)


def test_smooth_upsampling_is_the_windowed_sinc_sum():
    signal = randn(1, 2, 50, seed=3)
    got = upsample_smooth(signal, 3)
    padded = np.pad(signal[0].double().numpy(), ((0, 0), (30, 30)), mode="edge")
    # tap k = 21 is the centre: output m sits at m / 3 in input samples
    position = np.arange(-30, 80)
    want = []
    for m in range(150):
        t = (m / 3 - position) * 0.99
        weight = np.sinc(t) * np.cos(np.clip(t, -6, 6) * np.pi / 12) ** 2 * 0.99
        want.append(padded @ np.where(np.abs(t) < 6, weight, 0.0))
    assert_close("three times", got[0], torch.from_numpy(np.stack(want, axis=1)), 1e-6)


def test_causal_log_mel_is_a_windowed_fourier_transform():
    """With the bases of a Hann-windowed transform the front end is a plain short-time spectrum of the past."""
    mel_stft = tiny("extended").mel_stft
    n = np.arange(512)
    angle = 2 * math.pi * np.outer(np.arange(257), n) / 512
    window = 0.5 - 0.5 * np.cos(2 * math.pi * n / 512)
    basis = np.concatenate([np.cos(angle), -np.sin(angle)]) * window
    mel_stft.stft_fn.forward_basis.copy_(torch.from_numpy(basis)[:, None])
    signal = randn(1, 2, 800, seed=4)

    past = np.pad(signal[0].double().numpy(), ((0, 0), (432, 0)))
    frames = np.stack([past[:, 80 * i : 80 * i + 512] for i in range(10)], axis=1)
    magnitude = np.abs(np.fft.rfft(frames * window))
    want = np.log(np.maximum(magnitude @ mel_stft.mel_basis.double().numpy().T, 1e-5))
    assert_close("causal log-mel", mel_stft(signal)[0], torch.from_numpy(want), 1e-5)
