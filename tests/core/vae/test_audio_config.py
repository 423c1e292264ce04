import copy
import json
import pathlib

import pytest
import torch
from ltx2_engine.ltx2_core.config.audio import AudioVAEConfig, VocoderConfig
from ltx2_engine.ltx2_core.config.fields import ConfigError
from ltx2_engine.ltx2_core.vae.audio import AudioDecoder, AudioEncoder
from ltx2_engine.ltx2_core.vae.vocoder import Vocoder

RELEASES = json.loads((pathlib.Path(__file__).parents[2] / "data/audio_keys.json").read_text())
VERSIONS = ["2.0", "2.3", "2.5"]


def config_of(version, **changes):
    """The released configuration; ``changes`` maps a dotted path (dots as __) to a value, or to ... to delete it."""
    config = copy.deepcopy(RELEASES[version]["config"])
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = config
        for parent in parents:
            section = section[parent]
        if value is ...:
            del section[key]
        else:
            section[key] = value
    return config


def shapes_of(module, prefix):
    return {prefix + name: list(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_audio_vae_tensors_are_those_of_the_release(version):
    config = AudioVAEConfig.from_config(RELEASES[version]["config"])
    statistics = "audio_vae.per_channel_statistics."
    with torch.device("meta"):
        encoder = shapes_of(AudioEncoder(config), "audio_vae.encoder.")
        decoder = shapes_of(AudioDecoder(config), "audio_vae.decoder.")
    ours = {}
    for half, prefix in ((encoder, "audio_vae.encoder."), (decoder, "audio_vae.decoder.")):
        ours |= {n.replace(prefix + "per_channel_statistics.", statistics): shape for n, shape in half.items()}
    assert ours == RELEASES[version]["tensors"]["audio_vae"]
    assert len(ours) == 102


@pytest.mark.parametrize(("version", "count"), [("2.0", 194), ("2.3", 1227), ("2.5", 1227)])
def test_vocoder_tensors_are_those_of_the_release(version, count):
    with torch.device("meta"):
        ours = shapes_of(Vocoder(VocoderConfig.from_config(RELEASES[version]["config"])), "vocoder.")
    assert ours == RELEASES[version]["tensors"]["vocoder"]
    assert len(ours) == count


@pytest.mark.parametrize("version", VERSIONS)
def test_audio_vae_rates_and_lengths(version):
    config = AudioVAEConfig.from_config(RELEASES[version]["config"])
    assert (config.latent_channels, config.latent_mel_bins, config.token_width) == (8, 16, 128)
    assert (config.sample_rate, config.latents_per_second) == (16000, 25.0)
    assert [config.num_mel_frames(t) for t in (0, 1, 2, 126)] == [1, 1, 5, 501]
    assert [config.num_latents(m) for m in (1, 4, 5, 501)] == [1, 1, 2, 126]
    assert [config.mel.num_frames(n) for n in (159, 160, 80000)] == [1, 2, 501]


@pytest.mark.parametrize(
    ("version", "rate", "samples"), [("2.0", 24000, 240), ("2.3", 48000, 480), ("2.5", 48000, 480)]
)
def test_vocoder_rate_comes_from_the_upsampling(version, rate, samples):
    config = VocoderConfig.from_config(RELEASES[version]["config"])
    assert (config.sample_rate, config.samples_per_mel_frame) == (rate, samples)
    assert (config.bandwidth_extension is None) == (version == "2.0")


def test_final_activations_follow_the_file():
    flat = VocoderConfig.from_config(config_of("2.0"))
    nested = VocoderConfig.from_config(config_of("2.3"))
    assert (flat.generator.final_activation, flat.generator.output_bias) == ("tanh", True)
    assert (nested.generator.final_activation, nested.generator.output_bias) == ("clamp", False)
    assert nested.bandwidth_extension.generator.final_activation == "none"


def test_absent_preprocessing_means_the_released_front_end():
    assert AudioVAEConfig.from_config(config_of("2.0", audio_vae__preprocessing=...)) == AudioVAEConfig.from_config(
        config_of("2.0")
    )


DDCONFIG = "audio_vae__model__params__ddconfig__"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (DDCONFIG + "attn_resolutions", ..., "attn_resolutions is missing"),
        (DDCONFIG + "attn_resolutions", [16], r"attn_resolutions is \[16\]"),
        (DDCONFIG + "mid_block_add_attention", ..., "mid_block_add_attention is missing"),
        (DDCONFIG + "mid_block_add_attention", True, "mid_block_add_attention is True"),
        (DDCONFIG + "norm_type", "group", "norm_type is 'group'"),
        (DDCONFIG + "causality_axis", "width", "causality_axis is 'width'"),
        (DDCONFIG + "double_z", False, "double_z is False"),
        (DDCONFIG + "mel_bins", 80, "mel_bins is 80"),
        (DDCONFIG + "z_channels", 4, "ch is 128, but 4 latent channels"),
        (DDCONFIG + "ch_mult", [1, 2, 0], r"ch_mult .* found \[1, 2, 0\]"),
        (DDCONFIG + "ch_mult", [1, 2, 4, 8], "ch_mult must be a list of 3"),
        ("audio_vae__model__params__sampling_rate", 44100, "sampling_rate is 44100"),
        ("audio_vae__preprocessing__stft__causal", False, "stft.causal is False"),
        ("audio_vae__preprocessing__stft__win_length", 512, "win_length is 512"),
        ("audio_vae__preprocessing__stft__hop_length", 256, "hop_length is 256"),
        ("audio_vae__preprocessing__mel__n_mel_channels", 80, "n_mel_channels is 80"),
        ("audio_vae__preprocessing__mel__mel_fmax", 9000, "0 to 9000 Hz does not fit 0 to 8000 Hz"),
        ("audio_vae__model", ..., "audio_vae.model is missing"),
    ],
)
def test_unsupported_audio_vae_values_are_refused_by_name(path, value, message):
    with pytest.raises(ConfigError, match=message):
        AudioVAEConfig.from_config(config_of("2.0", **{path: value}))


@pytest.mark.parametrize(
    ("version", "path", "value", "message"),
    [
        ("2.0", "vocoder__stereo", False, "stereo is False"),
        ("2.0", "vocoder__resblock", "2", "resblock is '2'"),
        ("2.0", "vocoder__resblock_kernel_sizes", [3, 7], "resblock_kernel_sizes is"),
        ("2.0", "vocoder__resblock_dilation_sizes", [[1, 3, 5], [1, 3, 5], [1, 3, 7]], "resblock_dilation_sizes is"),
        ("2.0", "vocoder__upsample_initial_channel", 1000, "multiple of 32 for 5 stages, found 1000"),
        ("2.0", "vocoder__upsample_rates", [6, 5, 2, 2, 0], "upsample_rates must be"),
        ("2.0", "vocoder__upsample_rates", [60, 50, 20, 20, 20], "at most 192000 Hz"),
        ("2.0", "vocoder__upsample_rates", [], "must be a list of 0 whole numbers"),
        ("2.0", "vocoder__upsample_kernel_sizes", [16, 15, 8, 4], "upsample_kernel_sizes must be a list of 5"),
        ("2.0", "vocoder__upsample_kernel_sizes", [16, 16, 8, 4, 4], "by even numbers"),
        ("2.0", "vocoder__output_sampling_rate", 48000, "output_sampling_rate is 48000; this engine supports 24000"),
        ("2.0", "vocoder", ..., "vocoder is missing"),
        ("2.3", "vocoder__vocoder", ..., "vocoder.vocoder is missing"),
        ("2.3", "vocoder__vocoder__activation", "snake", "activation is 'snake'"),
        ("2.3", "vocoder__vocoder__activation", ..., "activation is missing"),
        ("2.3", "vocoder__vocoder__upsample_rates", [3, 2, 2, 2, 2, 2], "make 96 samples a frame.*need 160"),
        ("2.3", "vocoder__bwe__upsample_rates", [2, 5, 2, 2, 2], "make 80 samples a frame.*need 240"),
        ("2.3", "vocoder__bwe__num_mels", 80, "num_mels is 80"),
        ("2.3", "vocoder__bwe__input_sampling_rate", 24000, "input_sampling_rate is 24000"),
        ("2.3", "vocoder__bwe__output_sampling_rate", 32000, "output_sampling_rate is 32000"),
        ("2.3", "vocoder__bwe__win_size", 256, "win_size is 256"),
        ("2.3", "vocoder__bwe__hop_length", 96, "hop_length must divide 160, found 96"),
    ],
)
def test_unsupported_vocoder_values_are_refused_by_name(version, path, value, message):
    with pytest.raises(ConfigError, match=message):
        VocoderConfig.from_config(config_of(version, **{path: value}))
