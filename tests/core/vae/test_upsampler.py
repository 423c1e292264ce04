"""Latent upsamplers against ltx-core and diffusers, their key lists, and the messages for files that do not fit."""

from __future__ import annotations

import json
import logging
import pathlib
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from ltx2_engine.ltx2_core.config.fields import ConfigError
from ltx2_engine.ltx2_core.config.upsampler import UpsamplerConfig
from ltx2_engine.ltx2_core.config.version import ModelVersion
from ltx2_engine.ltx2_core.loading.build import MismatchError
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError
from ltx2_engine.ltx2_core.loading.store import load_component
from ltx2_engine.ltx2_core.loading.write import write_checkpoint
from ltx2_engine.ltx2_core.testing import assert_close
from ltx2_engine.ltx2_core.tiny_upsampler import KINDS, upsampler_file, write_tiny_upsampler
from ltx2_engine.ltx2_core.upsampler_files import build_upsampler, check_fits, read_upsampler
from ltx2_engine.ltx2_core.vae.layers import PerChannelStatistics
from ltx2_engine.ltx2_core.vae.upsampler import LatentUpsampler, binomial_kernel, upsample

KEYS = json.loads((pathlib.Path(__file__).parents[2] / "data" / "upsampler_keys.json").read_text())
RELEASED = {
    "2.0-spatial-x2": (Fraction(2), False),
    "2.3-spatial-x2": (Fraction(2), False),
    "2.3-spatial-x1.5": (Fraction(3, 2), False),
    "2.3-temporal-x2": (Fraction(1), True),
}
CHANNELS = 16
GRIDS = [(3, 5, 7), (1, 4, 3), (2, 6, 5)]


@pytest.fixture(autouse=True)
def one_thread():
    """Many tiny convolutions: the threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(RELEASED))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def tiny_config(kind: str) -> dict:
    """The released configuration with few channels."""
    return KEYS[kind]["config"] | {"in_channels": CHANNELS, "mid_channels": 64}


def tiny_upsampler(kind: str) -> LatentUpsampler:
    module = LatentUpsampler(UpsamplerConfig.from_config(tiny_config(kind)))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.named_parameters():
        values = torch.randn(tensor.shape, generator=generator)
        scale = 1.5 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.3
        tensor.data = values * scale + (1 if "norm" in name and name.endswith("weight") else 0)
    return module.requires_grad_(False)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics() -> PerChannelStatistics:
    module = PerChannelStatistics(CHANNELS)
    module.get_buffer("mean-of-means").copy_(random(CHANNELS, seed=2))
    module.get_buffer("std-of-means").copy_(random(CHANNELS, seed=3).abs() + 0.5)
    return module


def state(shapes: dict) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(tuple(shape), dtype=torch.bfloat16) for name, shape in shapes.items()}


# the released layouts ------------------------------------------------------------------------------------------------


def test_full_size_names_and_shapes_are_those_of_the_release(kind: str):
    module = build_upsampler(UpsamplerConfig.from_config(KEYS[kind]["config"]))
    assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == KEYS[kind]["tensors"]


def test_every_release_is_covered():
    assert set(KEYS) == set(RELEASED) == set(KINDS)


def test_tensors_tell_the_same_configuration_as_the_metadata(kind: str):
    config = UpsamplerConfig.from_config(KEYS[kind]["config"])
    assert UpsamplerConfig.from_shapes(KEYS[kind]["tensors"]) == config
    assert (config.spatial_ratio, config.temporal) == RELEASED[kind]
    assert config.latent_channels == 128


def test_temporal_file_may_carry_a_scale_and_a_resampler():
    """The 2.5 file does; they say nothing about it."""
    config = KEYS["2.3-temporal-x2"]["config"]
    carried = UpsamplerConfig.from_config(config | {"spatial_scale": 1.0, "rational_resampler": True})
    assert carried == UpsamplerConfig.from_config(config)


@pytest.mark.parametrize(
    ("kind", "grid", "want"),
    [
        ("2.0-spatial-x2", (16, 17, 30), (16, 34, 60)),
        ("2.3-spatial-x1.5", (16, 17, 30), (16, 26, 45)),
        ("2.3-spatial-x1.5", (1, 1, 3), (1, 2, 5)),
        ("2.3-temporal-x2", (16, 17, 30), (31, 17, 30)),
        ("2.3-temporal-x2", (1, 2, 3), (1, 2, 3)),
    ],
)
def test_output_grid(kind: str, grid: tuple[int, int, int], want: tuple[int, int, int]):
    assert UpsamplerConfig.from_config(KEYS[kind]["config"]).output_grid(*grid) == want


# numerics ------------------------------------------------------------------------------------------------------------


def reference_ltx_core(ltx_core, kind: str, ours: LatentUpsampler) -> torch.nn.Module:
    from ltx_core.model.upsampler import LatentUpsamplerConfigurator

    module = LatentUpsamplerConfigurator.from_config(tiny_config(kind))
    module.load_state_dict(ours.state_dict())
    return module.requires_grad_(False)


def reference_diffusers(diffusers, kind: str, ours: LatentUpsampler) -> torch.nn.Module:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    options = KEYS[kind]["diffusers_config"] | {"in_channels": CHANNELS, "mid_channels": 64}
    module = LTX2LatentUpsamplerModel(**options)
    module.load_state_dict(ours.state_dict())
    return module.requires_grad_(False)


@pytest.mark.reference
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("oracle", ["ltx_core", "diffusers"])
def test_forward_equals_the_reference(oracle: str, kind: str, grid: tuple[int, int, int], request):
    ours = tiny_upsampler(kind)
    build = {"ltx_core": reference_ltx_core, "diffusers": reference_diffusers}[oracle]
    reference = build(request.getfixturevalue(oracle), kind, ours)
    x = random(2, CHANNELS, *grid)
    got, want = ours(x), reference(x)
    assert tuple(got.shape[2:]) == ours.config.output_grid(*grid)
    assert want.std() > 0.1
    assert_close(f"{kind} {grid} {oracle}", got, want, 1e-5)


@pytest.mark.reference
def test_blur_of_a_fresh_module_is_that_of_ltx_core(ltx_core):
    from ltx_core.model.upsampler import LatentUpsamplerConfigurator

    reference = LatentUpsamplerConfigurator.from_config(tiny_config("2.3-spatial-x1.5"))
    want = reference.state_dict()["upsampler.blur_down.kernel"]
    assert torch.equal(binomial_kernel(), want)
    assert torch.equal(binomial_kernel().to(torch.bfloat16).float(), want)


@pytest.mark.reference
def test_bfloat16_is_bit_equal_to_ltx_core(ltx_core, kind: str):
    ours = tiny_upsampler(kind).to(torch.bfloat16)
    reference = reference_ltx_core(ltx_core, kind, ours).to(torch.bfloat16)
    x = random(1, CHANNELS, 3, 5, 6).to(torch.bfloat16)
    got, want = ours(x), reference(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.equal(got, want), (got.float() - want.float()).abs().max()


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upsample_equals_ltx_core(ltx_core, kind: str, dtype: torch.dtype):
    """With the statistics of the video VAE around it."""
    from ltx_core.model.upsampler import upsample_video
    from ltx_core.model.video_vae import VideoEncoderConfigurator

    vae = json.loads((pathlib.Path(__file__).parents[2] / "data" / "video_vae_keys.json").read_text())["2.3"]["config"]
    encoder = VideoEncoderConfigurator.from_config(
        {"vae": vae | {"latent_channels": CHANNELS, "encoder_base_channels": 16, "encoder_blocks": []}}
    )
    mine, ours = statistics().to(dtype), tiny_upsampler(kind).to(dtype)
    encoder.per_channel_statistics.load_state_dict(mine.state_dict(), strict=False)
    stand_in = SimpleNamespace(per_channel_statistics=encoder.per_channel_statistics.to(dtype))
    reference = reference_ltx_core(ltx_core, kind, ours).to(dtype)
    x = random(1, CHANNELS, 3, 5, 6).to(dtype)
    got, want = upsample(ours, mine, x), upsample_video(x, stand_in, reference)
    assert_close(f"{kind} {dtype}", got, want, 1e-5 if dtype == torch.float32 else 0.0)


def test_upsample_is_unnormalise_forward_normalise():
    ours, stats = tiny_upsampler("2.3-spatial-x2"), statistics()
    mean, std = (stats.get_buffer(f"{name}-of-means").view(-1, 1, 1, 1) for name in ("mean", "std"))
    x = random(1, CHANNELS, 2, 3, 4)
    assert_close("statistics", upsample(ours, stats, x), (ours(x * std + mean) - mean) / std, 1e-6)


def test_upsample_works_in_the_weights_dtype_and_answers_in_the_latents():
    ours, stats = tiny_upsampler("2.3-temporal-x2").to(torch.bfloat16), statistics()
    x = random(1, CHANNELS, 2, 3, 4)
    got = upsample(ours, stats, x)
    assert got.dtype == torch.float32
    assert torch.equal(got, upsample(ours, stats, x.to(torch.bfloat16)).float())


def test_every_stage_is_reported_and_may_end_the_run(kind: str):
    ours, calls = tiny_upsampler(kind), []
    upsample(ours, statistics(), random(1, CHANNELS, 2, 3, 4), lambda: calls.append(1))
    assert len(calls) == ours.config.num_stages == 9

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        upsample(ours, statistics(), random(1, CHANNELS, 2, 3, 4), stop)


# files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_file(tmp_path: pathlib.Path, kind: str) -> pathlib.Path:
    path = tmp_path / "latent_upscale_models" / upsampler_file(kind)
    write_tiny_upsampler(path, kind)
    return path


def test_tiny_file_has_the_released_layout_and_runs(tiny_file: pathlib.Path, kind: str):
    checkpoint, config = read_upsampler(tiny_file)
    assert set(checkpoint.tensors) == set(KEYS[kind]["tensors"])
    assert set(json.loads(checkpoint.metadata["config"])) == set(KEYS[kind]["config"])
    assert (config.spatial_ratio, config.temporal, config.latent_channels) == (*RELEASED[kind], CHANNELS)
    module = load_component(build_upsampler(config), checkpoint, "upsampler", device="cpu", dtype=torch.float32)
    got = upsample(module, statistics(), random(1, CHANNELS, 3, 5, 4))
    assert tuple(got.shape) == (1, CHANNELS, *config.output_grid(3, 5, 4))
    assert 0.2 < float(got.std()) < 5


def test_file_without_metadata_is_told_from_its_tensors(tmp_path: pathlib.Path, kind: str):
    config = UpsamplerConfig.from_config(tiny_config(kind))
    shapes = {name: tensor.shape for name, tensor in build_upsampler(config).state_dict().items()}
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, state(shapes), {})
    assert read_upsampler(path)[1] == config


def test_tiny_upsampler_of_another_kind_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"no tiny upsampler '2\.0-temporal-x2'; choose .*2\.3-temporal-x2"):
        write_tiny_upsampler(tmp_path / "x.safetensors", "2.0-temporal-x2")


def test_file_of_something_else_is_named(tmp_path: pathlib.Path):
    path = tmp_path / "vae.safetensors"
    write_checkpoint(path, state({"vae.decoder.conv_in.conv.weight": (1, 1)}), {})
    with pytest.raises(CheckpointError, match=r"vae\.safetensors: this is not a latent upsampler.* a video VAE"):
        read_upsampler(path)


def test_file_whose_tensors_deny_its_metadata_is_refused(tmp_path: pathlib.Path):
    plain = UpsamplerConfig.from_config(tiny_config("2.3-spatial-x2"))
    shapes = {name: tensor.shape for name, tensor in build_upsampler(plain).state_dict().items()}
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, state(shapes), {"config": json.dumps(tiny_config("2.0-spatial-x2"))})
    with pytest.raises(MismatchError) as error:
        read_upsampler(path)
    assert set(error.value.missing) == {"upsampler.conv.weight", "upsampler.conv.bias", "upsampler.blur_down.kernel"}
    assert set(error.value.unexpected) == {"upsampler.0.weight", "upsampler.0.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": 2}, r"config\.dims is 2; this engine supports 3"),
        ({"temporal_upsample": True}, "both true.*supports one of them"),
        ({"spatial_upsample": False}, "both false.*supports one of them"),
        ({"spatial_scale": 4.0}, r"spatial_scale is 4\.0; this engine supports 2\.0 or 1\.5"),
        ({"spatial_scale": 0.75}, r"spatial_scale is 0\.75; this engine supports 2\.0 or 1\.5"),
        ({"spatial_scale": 1.5, "rational_resampler": False}, r"spatial_scale is 1\.5; this engine supports 2\.0"),
        ({"mid_channels": 48}, "mid_channels is 48; it must be a multiple of 32"),
        ({"mid_channels": "64"}, "mid_channels must be a whole number"),
    ],
)
def test_unsupported_configurations_are_refused(change: dict, message: str, tmp_path: pathlib.Path):
    config = tiny_config("2.0-spatial-x2") | change
    with pytest.raises(ConfigError, match=message):
        UpsamplerConfig.from_config(config)
    path = tmp_path / "odd.safetensors"
    shapes = KEYS["2.0-spatial-x2"]["tensors"]
    write_checkpoint(path, state(dict.fromkeys(shapes, (1,))), {"config": json.dumps(config)})
    with pytest.raises(ConfigError, match=rf"odd\.safetensors: .*{message}"):
        read_upsampler(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"upsampler.0.weight": (8 * 64, 64, 3, 3, 3)},
            r"upsampler\.0\.weight is \[512, 64, 3, 3, 3\] for 64 channels",
        ),
        ({"upsampler.0.weight": (100, 64, 3, 3)}, r"\[100, 64, 3, 3\] for 64 channels, as in no released"),
        ({"upsampler.0.weight": (64,)}, r"upsampler\.0\.weight is \[64\]; it must have 4 or 5 dimensions"),
        ({"upsampler.0.weight": None}, r"upsampler\.0\.weight is missing"),
        ({"upsampler.conv.weight": (16 * 64, 64, 3, 3)}, r"upsampler\.conv\.weight is \[1024, 64, 3, 3\]"),
        ({"upsampler.conv.weight": (128, 64, 3, 3, 3)}, r"upsampler\.conv\.weight is \[128, 64, 3, 3, 3\]"),
        ({"initial_conv.weight": (0, 16, 3, 3, 3)}, r"initial_conv\.weight is \[0, 16, 3, 3, 3\]"),
        ({"res_blocks.0.conv1.weight": None}, "has 0 res_blocks; allowed are 1 to 64"),
    ],
)
def test_unsupported_tensors_are_refused(change: dict, message: str):
    shapes = {
        "initial_conv.weight": (64, 16, 3, 3, 3),
        "upsampler.0.weight": (256, 64, 3, 3),
        "res_blocks.0.conv1.weight": (64, 64, 3, 3, 3),
    }
    assert UpsamplerConfig.from_shapes(shapes).spatial_ratio == 2
    changed = {name: shape for name, shape in (shapes | change).items() if shape is not None}
    with pytest.raises(ConfigError, match=message):
        UpsamplerConfig.from_shapes(changed)


# does it fit the model -----------------------------------------------------------------------------------------------


def fits(channels: int, label: str, stated: str | None) -> None:
    config = UpsamplerConfig.from_config(tiny_config("2.3-spatial-x2"))
    check_fits(config, channels, label, "up.safetensors", None if stated is None else ModelVersion.parse(stated))


def test_upsampler_of_other_channels_is_refused():
    with pytest.raises(ConfigError, match=r"up\.safetensors: .* 16 channels, but the model's have 128.*LTX-2\.3"):
        fits(128, "2.3", None)


@pytest.mark.parametrize(("label", "stated"), [("2.3", "2.0.0"), ("2.5", "2.0"), ("2.0", "2.3.0"), ("2.0", "0.9.7")])
def test_upsampler_of_another_version_is_refused(label: str, stated: str):
    release = "2.0" if label == "2.0" else "2.3 or 2.5"
    with pytest.raises(ConfigError, match=rf"up\.safetensors: .*for LTX-{stated[:3]}, .*LTX-{label}: .*LTX-{release}"):
        fits(CHANNELS, label, stated)


@pytest.mark.parametrize(("label", "stated"), [("2.0", "2.0.0"), ("2.3", "2.3.0"), ("2.5", "2.3.1"), ("2.3", "2.5")])
def test_upsampler_of_the_same_latent_space_fits(label: str, stated: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    fits(CHANNELS, label, stated)
    assert not caplog.messages


def test_upsampler_that_states_no_version_is_logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    fits(CHANNELS, "2.3", None)
    assert "up.safetensors (spatial x2) does not say which version it is for; taken to fit LTX-2.3" in caplog.text
