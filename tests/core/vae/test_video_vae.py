"""The video VAE against diffusers and ltx-core, its key lists, and its streams against whole passes."""

from __future__ import annotations

import copy
import json
import pathlib

import pytest
import torch
from ltx2_engine.kernels import depth_to_space, pixel_norm_silu
from ltx2_engine.ltx2_core.config.video_vae import VideoVAEConfig
from ltx2_engine.ltx2_core.testing import assert_close
from ltx2_engine.ltx2_core.vae import layers
from ltx2_engine.ltx2_core.vae.video_decoder import VideoDecoder
from ltx2_engine.ltx2_core.vae.video_encoder import VideoEncoder

KEYS = json.loads((pathlib.Path(__file__).parents[2] / "data" / "video_vae_keys.json").read_text())
LAYOUTS = ("2.0", "2.0-timestep", "2.3")
WIDTH = 8


@pytest.fixture(autouse=True)
def one_thread():
    """Many tiny convolutions: the threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_config(layout: str) -> dict:
    """The released configuration with narrow layers, one residual block per stack."""
    config = copy.deepcopy(KEYS[layout]["config"])
    config.update(latent_channels=WIDTH, encoder_base_channels=WIDTH, decoder_base_channels=WIDTH)
    for _, params in (*config["encoder_blocks"], *config["decoder_blocks"]):
        if "num_layers" in params:
            params["num_layers"] = 1
    return {"vae": config}


def tiny_vae(layout: str, seed: int = 0) -> tuple[VideoEncoder, VideoDecoder]:
    config = VideoVAEConfig.from_config(tiny_config(layout))
    encoder, decoder = VideoEncoder(config), VideoDecoder(config)
    generator = torch.Generator().manual_seed(seed)
    for module in (encoder, decoder):
        for name, tensor in module.state_dict().items():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
            std = 1.5 / fan_in**0.5 if tensor.ndim == 5 or tensor.ndim == 2 else 0.2
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
            if name.endswith("std-of-means"):
                tensor.abs_().add_(0.5)
            if name.endswith("timestep_scale_multiplier"):
                tensor.fill_(916.0)
        module.requires_grad_(False)
    decoder.per_channel_statistics.load_state_dict(encoder.per_channel_statistics.state_dict())
    return encoder, decoder


def checkpoint(encoder: VideoEncoder, decoder: VideoDecoder) -> dict[str, torch.Tensor]:
    """Both halves under the names of a released file, without the `vae.` prefix."""
    tensors = {}
    for half, module in (("encoder", encoder), ("decoder", decoder)):
        for name, tensor in module.state_dict().items():
            tensors[name if name.startswith("per_channel_statistics.") else f"{half}.{name}"] = tensor
    return tensors


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(frames: int, height: int = 64, width: int = 96, batch: int = 1) -> torch.Tensor:
    return random(batch, 3, frames, height, width, seed=frames).clamp(-1, 1)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("release", sorted(KEYS))
def test_full_size_names_and_shapes_are_those_of_the_release(release: str):
    config = VideoVAEConfig.from_config({"vae": KEYS[release]["config"]})
    with torch.device("meta"):
        tensors = checkpoint(VideoEncoder(config), VideoDecoder(config))
    ours = {f"vae.{name}": list(tensor.shape) for name, tensor in tensors.items()}
    assert ours == KEYS[release]["tensors"]


def ltx_core_vae():
    return pytest.importorskip("ltx_core.model.video_vae", reason="ltx-core is not installed")


def load_ltx_core(module: torch.nn.Module, ours: torch.nn.Module) -> torch.nn.Module:
    missing, unexpected = module.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected, unexpected
    # its statistics may hold more buffers than the two that a file has
    assert all(name.startswith("per_channel_statistics.") for name in missing), missing
    return module.requires_grad_(False)


@pytest.mark.reference
@pytest.mark.parametrize("frames", [1, 17])
def test_encoder_equals_ltx_core(layout: str, frames: int):
    reference = ltx_core_vae().VideoEncoderConfigurator.from_config(tiny_config(layout))
    encoder, _ = tiny_vae(layout)
    load_ltx_core(reference, encoder)
    x = pixels(frames, batch=2)
    with torch.no_grad():
        assert_close(f"encode {layout} {frames}", encoder(x), reference(x), 1e-5)


@pytest.mark.reference
@pytest.mark.parametrize(("frames", "causal"), [(1, False), (2, True), (3, False)])
def test_decoder_equals_ltx_core(layout: str, frames: int, causal: bool):
    config = tiny_config(layout)
    config["vae"]["causal_decoder"] = causal
    reference = ltx_core_vae().VideoDecoderConfigurator.from_config(config)
    decoder = VideoDecoder(VideoVAEConfig.from_config(config))
    decoder.load_state_dict(tiny_vae(layout)[1].state_dict())
    load_ltx_core(reference, decoder)
    z = random(2, WIDTH, frames, 2, 3)
    timestep = torch.full((2,), 0.05) if layout == "2.0-timestep" else None
    noise = torch.Generator().manual_seed(7) if layout == "2.0-timestep" else None
    with torch.no_grad():
        want = reference(z, timestep=timestep, generator=torch.Generator().manual_seed(7))
        assert_close(f"decode {layout} {frames}", decoder(z, noise=noise), want, 1e-5)


@pytest.mark.reference
def test_bf16_rounds_where_ltx_core_rounds(layout: str):
    module = ltx_core_vae()
    encoder, decoder = tiny_vae(layout)
    encode = load_ltx_core(module.VideoEncoderConfigurator.from_config(tiny_config(layout)), encoder).bfloat16()
    decode = load_ltx_core(module.VideoDecoderConfigurator.from_config(tiny_config(layout)), decoder).bfloat16()
    x, z = pixels(9).bfloat16(), random(1, WIDTH, 2, 2, 3).bfloat16()
    seeded = [torch.Generator().manual_seed(7) if layout == "2.0-timestep" else None for _ in range(2)]
    with torch.no_grad():
        assert torch.equal(encoder.bfloat16()(x), encode(x))
        assert torch.equal(decoder.bfloat16()(z, noise=seeded[0]), decode(z, generator=seeded[1]))


def diffusers_vae(layout: str):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference")
    config = dict(KEYS[layout]["diffusers_config"])
    scale = config["latent_channels"] // WIDTH
    config["latent_channels"] = WIDTH
    for key in ("block_out_channels", "decoder_block_out_channels"):
        config[key] = tuple(channels // scale for channels in config[key])
    for key in ("layers_per_block", "decoder_layers_per_block"):
        config[key] = (1,) * len(config[key])
    reference = diffusers.AutoencoderKLLTX2Video(**config)
    tensors = {f"vae.{name}": tensor for name, tensor in checkpoint(*tiny_vae(layout)).items()}
    names = KEYS[layout]["diffusers_names"]
    renamed = {new: tensor for name, tensor in tensors.items() for new in names[name]}
    missing, unexpected = reference.load_state_dict(renamed, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return reference.requires_grad_(False).train(False)


@pytest.mark.reference
def test_vae_equals_diffusers(layout: str):
    reference = diffusers_vae(layout)
    encoder, decoder = tiny_vae(layout)
    statistics = encoder.per_channel_statistics
    x, z = pixels(17), random(1, WIDTH, 3, 2, 3)
    noise = random(*z.shape, seed=3) if layout == "2.0-timestep" else None
    mixed = z if noise is None else 0.025 * noise + 0.975 * z
    with torch.no_grad():
        want = statistics.normalize(reference.encode(x).latent_dist.mode())
        assert_close(f"encode {layout}", encoder(x), want, 1e-5)
        want = reference.decode(statistics.unnormalize(mixed), temb=torch.tensor([0.05]), return_dict=False)[0]
        assert_close(f"decode {layout}", decoder(z, noise=noise), want, 1e-5)


@pytest.mark.parametrize(("frames", "chunk"), [(1, 8), (9, 8), (17, 8), (17, 16), (25, 16), (25, 8)])
def test_streamed_encoder_equals_whole_pass(layout: str, frames: int, chunk: int):
    encoder, _ = tiny_vae(layout)
    x = pixels(frames, 64, 32)
    with torch.no_grad():
        chunks = list(encoder.stream(x, chunk))
        assert len(chunks) == max(1, -(-(frames - 1) // chunk))
        assert_close("stream", torch.cat(chunks, 2), encoder(x), 1e-5)


@pytest.mark.parametrize(("latent_frames", "chunk"), [(1, 3), (2, 1), (3, 3), (3, 8), (4, 8)])
def test_streamed_decoder_equals_whole_pass(layout: str, latent_frames: int, chunk: int):
    _, decoder = tiny_vae(layout)
    z = random(1, WIDTH, latent_frames, 2, 2)
    with torch.no_grad():
        chunks = list(decoder.stream(z, chunk))
        whole = decoder(z)
    assert whole.shape == (1, 3, 8 * latent_frames - 7, 64, 64)
    assert latent_frames == 1 or len(chunks) > 1
    assert_close("stream", torch.cat(chunks, 2), whole, 1e-5)


@pytest.mark.parametrize("chunk", [1, 8, 16, 24])
def test_streamed_bf16_decoder_has_the_bits_of_the_whole_pass(layout: str, chunk: int):
    decoder = tiny_vae(layout)[1].bfloat16()
    z = random(2, WIDTH, 5, 2, 3).bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.cat(list(decoder.stream(z, chunk)), 2), decoder(z))


def test_convolution_in_parts_below_the_index_limit_equals_one_call(monkeypatch: pytest.MonkeyPatch):
    _, decoder = tiny_vae("2.3")
    z = random(1, WIDTH, 3, 2, 2)
    with torch.no_grad():
        whole = decoder(z)
        monkeypatch.setattr(layers, "MAX_CONV_ELEMENTS", 20_000)
        assert_close("parts", decoder(z), whole, 1e-5)


def test_space_to_depth_and_patchify_are_inverted():
    x = random(2, 3, 4, 8, 12)
    for stride in ((1, 2, 2), (2, 1, 1), (2, 2, 2)):
        assert torch.equal(depth_to_space(layers.space_to_depth(x, stride), stride), x)
    assert torch.equal(layers.unpatchify(layers.patchify(x, 4), 4), x)


def test_decode_noise_is_seeded_and_a_tensor_or_generator():
    _, decoder = tiny_vae("2.0-timestep")
    z = random(1, WIDTH, 1, 2, 2)
    with torch.no_grad():
        same = torch.randn(z.shape, generator=torch.Generator().manual_seed(42))
        assert torch.equal(decoder(z), decoder(z, noise=same))
        assert not torch.equal(decoder(z), decoder(z, noise=torch.Generator().manual_seed(1)))
        assert not torch.equal(decoder(z), decoder(z, decode_timestep=0.5))
    with pytest.raises(ValueError, match=r"noise must have the latents' shape"):
        decoder(z, noise=same[:, :1])


def test_an_unconditioned_decoder_draws_no_noise_and_refuses_a_tensor_of_it():
    _, decoder = tiny_vae("2.3")
    z, generator = random(1, WIDTH, 1, 2, 2), torch.Generator().manual_seed(3)
    with torch.no_grad():
        assert torch.equal(decoder(z, noise=generator), decoder(z))
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())
    with pytest.raises(ValueError, match="takes no noise"):
        decoder(z, noise=z)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 64, 64), "8 frames cannot be encoded: use 8k [+] 1, nearest 1 or 9"),
        ((1, 3, 9, 65, 64), "height 65 cannot be encoded: use a multiple of 32, nearest 64 or 96"),
        ((1, 3, 9, 64, 31), "width 31 cannot be encoded: use a multiple of 32, nearest 32"),
        ((1, 4, 9, 64, 64), r"pixels must be \[batch, 3, frames, height, width\], got \(1, 4, 9, 64, 64\)"),
    ],
)
def test_encoder_names_the_nearest_valid_size(shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        tiny_vae("2.3")[0](torch.zeros(shape))


def test_decoder_refuses_what_it_cannot_mirror():
    _, decoder = tiny_vae("2.0")
    with pytest.raises(ValueError, match=r"3x1 latents \(96x32 pixels\) are too small.*64x64 pixels"):
        decoder(random(1, WIDTH, 2, 1, 3))
    with torch.no_grad():
        assert tiny_vae("2.3")[1](random(1, WIDTH, 1, 1, 1)).shape == (1, 3, 1, 32, 32)


def test_decoder_refuses_latents_of_another_width():
    with pytest.raises(ValueError, match=r"video latents must be \[batch, 8, .*got \(1, 4, 1, 2, 2\)"):
        tiny_vae("2.3")[1](random(1, 4, 1, 2, 2))


def test_pixel_norm_rounds_after_every_operation_in_bf16():
    x = random(2, 64, 3, 4, 4).bfloat16()
    shift, scale = random(2, 64, 1, 1, 1).bfloat16(), random(2, 64, 1, 1, 1, seed=2).bfloat16()
    out = torch.empty_like(x)
    pixel_norm_silu(x, out, (shift, scale))
    mean = (x.float() ** 2).bfloat16().float().mean(1, keepdim=True).bfloat16()
    rms = (mean.float() + 1e-8).bfloat16().float().sqrt().bfloat16()
    y = (x.float() / rms.float()).bfloat16()
    y = (y.float() * (1 + scale.float()).bfloat16().float()).bfloat16()
    y = (y.float() + shift.float()).bfloat16()
    assert torch.equal(out, torch.nn.functional.silu(y))
