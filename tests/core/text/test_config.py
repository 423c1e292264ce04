"""The text path's configuration from checkpoint metadata."""

import pytest
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.config.fields import ConfigError
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.config.text import TextConfig


def read(version, **changes):
    config = released_config(version)
    config["transformer"] = {k: v for k, v in (config["transformer"] | changes).items() if v is not ...}
    return TextConfig.from_config(config)


@pytest.mark.parametrize(
    ("version", "per_modality", "widths", "layers", "gated"),
    [
        ("2.0", False, AV(3840, 3840), 2, False),
        ("2.3", True, AV(4096, 2048), 8, True),
        ("2.5", True, AV(4096, 2048), 8, True),
    ],
)
def test_released_versions(version, per_modality, widths, layers, gated):
    config = read(version)
    assert (config.per_modality_projection, config.widths, config.feature_dim) == (per_modality, widths, 3840)
    for connector in config.connectors.present():
        assert (connector.num_layers, connector.gated, connector.ff_bias) == (layers, gated, True)
        assert (connector.max_pos, connector.num_registers) == (4096, 128)
        assert (connector.rope_theta, connector.double_precision) == (10000.0, True)


def test_the_audio_connector_falls_back_to_the_video_values():
    config = read("2.3", audio_connector_num_layers=3, audio_connector_apply_gated_attention=False)
    assert (config.connectors.video.num_layers, config.connectors.audio.num_layers) == (8, 3)
    assert (config.connectors.video.gated, config.connectors.audio.gated) == (True, False)


def test_a_missing_max_pos_is_4096():
    assert read("2.0", connector_positional_embedding_max_pos=...).connectors.video.max_pos == 4096


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        ("2.0", {"caption_proj_before_connector": True}, r"all of .* or none of these keys"),
        ("2.3", {"caption_proj_input_norm": ...}, r"all of .* or none of these keys"),
        ("2.3", {"caption_projection_first_linear": True}, r"all of .* or none of these keys"),
        ("2.0", {"rope_type": "interleaved"}, r"rope_type is 'interleaved'; this engine supports 'split'"),
        ("2.0", {"use_embeddings_connector": False}, "use_embeddings_connector is False"),
        ("2.5", {"text_encoder_norm_type": "layer_range"}, r"'layer_range'; this engine supports 'per_token_rms'"),
        ("2.0", {"text_encoder_norm_type": "per_token_rms"}, "no such key beside a shared projection"),
        ("2.0", {"connector_num_attention_heads": 32}, "connector is 4096 wide, but it shares features of width 3840"),
        ("2.3", {"audio_connector_attention_head_dim": ...}, r"audio_cross_attention_dim is 2048, but .* 4096 wide"),
        ("2.3", {"connector_num_layers": 10**6}, "between 1 and 512"),
        ("2.3", {"connector_positional_embedding_max_pos": [4096, 1]}, "list of 1 whole numbers"),
    ],
)
def test_unsupported_values_are_refused_by_name(version, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(version, **changes)
