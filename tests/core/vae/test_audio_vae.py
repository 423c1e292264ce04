import pytest
import torch
from ltx2_engine.ltx2_core.config.audio import AudioVAEConfig
from ltx2_engine.ltx2_core.testing import assert_close
from ltx2_engine.ltx2_core.vae.audio import AudioDecoder, AudioEncoder

RAW = {
    "audio_vae": {
        "model": {
            "params": {
                "ddconfig": {
                    "ch": 32,
                    "ch_mult": [1, 2, 4],
                    "num_res_blocks": 2,
                    "in_channels": 2,
                    "out_ch": 2,
                    "z_channels": 2,
                    "double_z": True,
                    "resolution": 256,
                    "attn_resolutions": [],
                    "mid_block_add_attention": False,
                    "norm_type": "pixel",
                    "causality_axis": "height",
                    "mel_bins": 64,
                    "dropout": 0.0,
                },
                "sampling_rate": 16000,
            }
        },
        "preprocessing": {
            "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
            "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
        },
    }
}
CONFIG = AudioVAEConfig.from_config(RAW)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of tiny operations: threads that wait for each other cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(module):
    """Weights that keep the scale, biases and statistics large enough to be missed."""
    for i, (name, tensor) in enumerate(module.state_dict().items()):
        if name.endswith("std-of-means"):
            value = 0.5 + randn(*tensor.shape, seed=7).abs()
        elif name.endswith("mean-of-means"):
            value = randn(*tensor.shape, seed=8)
        elif tensor.ndim == 1:
            value = 0.2 * randn(*tensor.shape, seed=i)
        else:
            value = randn(*tensor.shape, seed=i) / tensor[0].numel() ** 0.5
        tensor.copy_(value)
    return module.requires_grad_(False).train(False)


@pytest.fixture(scope="module")
def encoder():
    return randomise(AudioEncoder(CONFIG))


@pytest.fixture(scope="module")
def decoder():
    return randomise(AudioDecoder(CONFIG))


@pytest.fixture(scope="module")
def diffusers_vae(encoder, decoder):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=32, latent_channels=2, norm_type="pixel", causality_axis="height", mel_bins=64
    )
    halves = (("encoder.", encoder), ("decoder.", decoder))
    state = {prefix + n: t for prefix, half in halves for n, t in half.state_dict().items() if "statistics" not in n}
    state["latents_mean"] = encoder.per_channel_statistics.get_buffer("mean-of-means")
    state["latents_std"] = encoder.per_channel_statistics.get_buffer("std-of-means")
    vae.load_state_dict(state, strict=True)
    return vae.requires_grad_(False).train(False)


def as_tokens(latents):
    return latents.transpose(1, 2).flatten(2)


def as_latents(tokens):
    return tokens.unflatten(2, (2, 16)).transpose(1, 2)


@pytest.mark.reference
@pytest.mark.parametrize("mel_frames", [1, 5, 9, 14])
def test_encoder_matches_diffusers(encoder, diffusers_vae, mel_frames):
    log_mel = randn(2, 2, mel_frames, 64, seed=1) * 2 - 4
    raw = diffusers_vae.encode(log_mel).latent_dist.mean
    want = as_latents((as_tokens(raw) - diffusers_vae.latents_mean) / diffusers_vae.latents_std)
    assert_close(f"encode {mel_frames}", encoder(log_mel), want, 1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("latents", [1, 2, 7])
def test_decoder_matches_diffusers(decoder, diffusers_vae, latents):
    z = randn(2, 2, latents, 16, seed=2)
    raw = as_latents(as_tokens(z) * diffusers_vae.latents_std + diffusers_vae.latents_mean)
    assert_close(f"decode {latents}", decoder(z), diffusers_vae.decode(raw).sample, 1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("size", [1, 6])
def test_both_halves_match_ltx_core(encoder, decoder, size):
    reference = pytest.importorskip("ltx_core.model.audio_vae", reason="ltx-core is not installed")
    for configurator, ours, x in (
        (reference.AudioEncoderConfigurator, encoder, randn(2, 2, size, 64, seed=3) * 2 - 4),
        (reference.AudioDecoderConfigurator, decoder, randn(2, 2, size, 16, seed=4)),
    ):
        theirs = configurator.from_config(RAW).requires_grad_(False).train(False)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert_close(type(ours).__name__, ours(x), theirs(x), 1e-5)


@pytest.mark.parametrize("mel_frames", range(1, 14))
def test_encoded_length_is_as_the_config_says(encoder, mel_frames):
    latents = encoder(randn(1, 2, mel_frames, 64, seed=5))
    assert latents.shape == (1, 2, CONFIG.num_latents(mel_frames), 16)


@pytest.mark.parametrize("latents", [1, 2, 5])
def test_decoded_length_is_as_the_config_says(decoder, latents):
    assert decoder(randn(1, 2, latents, 16, seed=6)).shape == (1, 2, CONFIG.num_mel_frames(latents), 64)


def test_later_latents_do_not_change_earlier_sound(decoder):
    z = randn(1, 2, 6, 16, seed=9)
    changed = z.clone()
    changed[:, :, 4:] += 1
    before, after = decoder(z), decoder(changed)
    assert torch.allclose(before[:, :, : 4 * 4 - 3], after[:, :, : 4 * 4 - 3], atol=1e-6)
    assert not torch.allclose(before[:, :, 4 * 4 - 3 :], after[:, :, 4 * 4 - 3 :], atol=1e-2)


def test_halves_can_be_interrupted_between_levels(encoder, decoder):
    calls = []

    def stop_at_second():
        calls.append(None)
        if len(calls) == 2:
            raise InterruptedError

    for module, x in ((encoder, randn(1, 2, 5, 64, seed=1)), (decoder, randn(1, 2, 2, 16, seed=1))):
        calls.clear()
        with pytest.raises(InterruptedError):
            module(x, on_stage=stop_at_second)
        assert len(calls) == 2


def test_half_precision_latents_are_decoded_in_the_weights_dtype(decoder):
    z = randn(1, 2, 2, 16, seed=1).bfloat16()
    got = decoder(z)
    assert got.dtype == torch.float32
    assert torch.equal(got, decoder(z.float()))
