"""Reading the video VAE's configuration."""

from __future__ import annotations

import copy
import json
import logging
import pathlib

import pytest
from ltx2_engine.ltx2_core.config.fields import ConfigError
from ltx2_engine.ltx2_core.config.video_vae import ResampleConfig, ResStackConfig, VideoVAEConfig

KEYS = json.loads((pathlib.Path(__file__).parents[2] / "data" / "video_vae_keys.json").read_text())


def release(version: str, **changes) -> dict:
    config = copy.deepcopy(KEYS[version]["config"])
    config.update(changes)
    return {"vae": {key: value for key, value in config.items() if value is not None}}


@pytest.mark.parametrize("version", sorted(KEYS))
def test_every_release_has_factors_32_and_8(version: str):
    config = VideoVAEConfig.from_config(release(version))
    assert (config.latent_channels, config.spatial_factor, config.temporal_factor) == (128, 32, 8)
    assert (config.decoder.spatial_factor, config.decoder.temporal_factor) == (32, 8)
    assert config.decoder.bottleneck_channels == 1024


def test_absent_padding_mode_differs_between_the_halves_and_a_present_one_governs_both():
    def modes(**changes):
        config = VideoVAEConfig.from_config(release("2.0", **changes))
        return config.encoder.padding_mode, config.decoder.padding_mode

    assert modes() == ("zeros", "reflect")
    assert modes(spatial_padding_mode="zeros") == ("zeros", "zeros")
    assert modes(spatial_padding_mode="reflect") == ("reflect", "reflect")
    assert modes(encoder_spatial_padding_mode="reflect") == ("reflect", "reflect")
    assert modes(encoder_spatial_padding_mode="reflect", spatial_padding_mode="zeros") == ("zeros", "zeros")


def test_decoder_blocks_run_in_reversed_order():
    blocks = VideoVAEConfig.from_config(release("2.3")).decoder.blocks
    assert [b.num_layers for b in blocks if isinstance(b, ResStackConfig)] == [2, 2, 4, 6, 4]
    assert [b.channels for b in blocks if isinstance(b, ResStackConfig)] == [1024, 512, 512, 256, 128]
    assert [b.stride for b in blocks if isinstance(b, ResampleConfig)] == [(2, 2, 2), (2, 2, 2), (2, 1, 1), (1, 2, 2)]


def test_absent_encoder_width_is_the_latent_width():
    config = VideoVAEConfig.from_config(release("2.0", latent_channels=64))
    assert config.encoder.base_channels == 64
    assert config.decoder.last_channels == 128


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("tensors", [True, False, None])
def test_tensors_win_over_the_timestep_flag(flag, tensors, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "ltx2.vae"):
        config = VideoVAEConfig.from_config(release("2.0", timestep_conditioning=flag), timestep_conditioning=tensors)
    assert config.decoder.timestep_conditioning is (bool(flag) if tensors is None else tensors)
    assert len(caplog.records) == (None not in (flag, tensors) and flag != tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "CausalDiffusionVAE"}, "'CausalDiffusionVAE'.*'CausalVideoAutoencoder'"),
        ({"norm_layer": "group_norm"}, "norm_layer is 'group_norm'.*'pixel_norm'"),
        ({"dims": 2}, "dims is 2"),
        ({"latent_log_var": "per_channel"}, "latent_log_var is 'per_channel'"),
        ({"spatial_padding_mode": "circular"}, "spatial_padding_mode is 'circular'.*'zeros' or 'reflect'"),
        ({"encoder_blocks": [["attn", {}]]}, r"encoder_blocks\[0\] is a block named 'attn'.*compress_space_res"),
        ({"encoder_blocks": [["compress_all", {"multiplier": 2}]]}, "named 'compress_all'"),
        ({"decoder_blocks": [["res_x_y", {"multiplier": 2}]]}, "named 'res_x_y'.*res_x, compress_space"),
        ({"decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]]}, "inject_noise is True"),
        ({"decoder_blocks": [["res_x", 0]]}, "num_layers must be between 1 and 64"),
        ({"decoder_blocks": [["res_x", 2]]}, "encoder's spatial_factor is 32 and the decoder's 4"),
        ({"decoder_blocks": "res_x"}, "must be a list of 1 to 64 blocks"),
        ({"decoder_blocks": [["compress_time", {"multiplier": 2, "residual": True}]]}, "compress_all only"),
        ({"encoder_base_channels": 3}, "does not come out even"),
    ],
)
def test_unsupported_values_are_named(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        VideoVAEConfig.from_config(release("2.0", **changes))


def test_a_bare_number_is_the_layer_count():
    blocks = [["res_x", 3] if name == "res_x" else [name, p] for name, p in KEYS["2.3"]["config"]["decoder_blocks"]]
    config = VideoVAEConfig.from_config(release("2.3", decoder_blocks=blocks))
    assert {b.num_layers for b in config.decoder.blocks if isinstance(b, ResStackConfig)} == {3}


def test_a_file_without_a_vae_section_is_refused():
    with pytest.raises(ConfigError, match=r"config\.vae is missing"):
        VideoVAEConfig.from_config({"transformer": {}})
