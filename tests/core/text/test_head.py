"""Feature extractors and connectors against diffusers 0.42.1 and ltx-core 1.0.0, tiny random weights.

Known deviations of the oracles, handled here: both take the sequence as long as it comes (so they get states padded to
1024), ltx-core compacts a batch of one only, keeps its registers in bfloat16 and fixes 128 of them, and diffusers
rotates in float32.
"""

import json
from pathlib import Path

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.config.text import TextConfig
from ltx2_engine.ltx2_core.testing import assert_close, relative_error
from ltx2_engine.ltx2_core.text.connector import Connector
from ltx2_engine.ltx2_core.text.head import TextHead

reference = pytest.mark.reference
KEYS = json.loads((Path(__file__).parents[2] / "data" / "text_keys.json").read_text())
PREFIXES = {
    "projection.": "text_embedding_projection.",
    "connectors.video.": "model.diffusion_model.video_embeddings_connector.",
    "connectors.audio.": "model.diffusion_model.audio_embeddings_connector.",
}
# checkpoint -> diffusers
RENAMES = (
    ("model.diffusion_model.", ""),
    ("_embeddings_connector", "_connector"),
    ("transformer_1d_blocks", "transformer_blocks"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
    ("text_embedding_projection.aggregate_embed", "text_proj_in"),
    ("text_embedding_projection.video_aggregate_embed", "video_text_proj_in"),
    ("text_embedding_projection.audio_aggregate_embed", "audio_text_proj_in"),
)
DIM, STATES = 48, 5
VERSIONS = ("2.0", "2.3")
# 11 and 1 are no multiples of the register count
COUNTS = (11, 1, 16)


def section(version, registers=8):
    """The released keys with tiny sizes."""
    tiny = {
        "caption_channels": DIM,
        "cross_attention_dim": 64,
        "audio_cross_attention_dim": 32,
        "connector_num_attention_heads": 4,
        "connector_attention_head_dim": 16 if version == "2.3" else 12,
        "connector_num_layers": 2,
        "connector_num_learnable_registers": registers,
    }
    if version == "2.3":
        tiny |= {"audio_connector_num_attention_heads": 4, "audio_connector_attention_head_dim": 8}
    return KEYS[version]["config"] | tiny


def config(version, **kwargs):
    return TextConfig.from_config({"transformer": section(version, **kwargs)})


def checkpoint_name(name):
    prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    return PREFIXES[prefix] + name.removeprefix(prefix)


def random_head(version, **kwargs):
    torch.manual_seed(0)
    head = TextHead(config(version, **kwargs), STATES)
    for name, parameter in head.named_parameters():
        near_one = name.endswith(("q_norm.weight", "k_norm.weight"))
        registers = name.endswith("learnable_registers")
        parameter.copy_(torch.randn(parameter.shape) * (1.0 if registers else 0.15) + near_one)
    return head


def states_and_mask(counts, length=16, dtype=torch.float32):
    """States whose layers differ in scale and mean; left padding holds garbage."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn((len(counts), length, DIM, STATES), generator=generator)
    states = states * torch.linspace(0.5, 20, STATES) + torch.linspace(-3, 2, STATES)
    mask = torch.arange(length) >= length - torch.tensor(counts)[:, None]
    states[~mask] *= 50
    return states.to(dtype), mask


def left_padded(states, mask, length=1024):
    garbage = torch.full((states.shape[0], length - states.shape[1], *states.shape[2:]), 7.0, dtype=states.dtype)
    return torch.cat([garbage, states], 1), torch.nn.functional.pad(mask, (length - mask.shape[1], 0))


def diffusers_oracle(version, head):
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    sizes = config(version).connectors
    kwargs = {}
    for name, connector in (("video", sizes.video), ("audio", sizes.audio)):
        kwargs |= {
            f"{name}_connector_num_attention_heads": connector.heads,
            f"{name}_connector_attention_head_dim": connector.head_dim,
            f"{name}_connector_num_layers": connector.num_layers,
            f"{name}_connector_num_learnable_registers": connector.num_registers,
            f"{name}_gated_attn": connector.gated,
        }
    if version == "2.3":
        kwargs |= {"per_modality_projections": True, "proj_bias": True, "video_hidden_dim": 64, "audio_hidden_dim": 32}
    oracle = LTX2TextConnectors(caption_channels=DIM, text_proj_in_factor=STATES, rope_type="split", **kwargs)
    state = {}
    for name, value in head.state_dict().items():
        renamed = checkpoint_name(name)
        for old, new in RENAMES:
            renamed = renamed.replace(old, new)
        state[renamed] = value
    oracle.load_state_dict(state, strict=True)
    return oracle


def ltx_core_extractor(version, head):
    from ltx_core.text_encoders.gemma.feature_extractor import FeatureExtractorV1, FeatureExtractorV2

    if version == "2.0":
        return FeatureExtractorV1(head.projection.aggregate_embed, is_av=True)
    return FeatureExtractorV2(head.projection.video_aggregate_embed, DIM, head.projection.audio_aggregate_embed)


def ltx_core_connectors(version, head, dtype=torch.float32):
    from ltx_core.text_encoders.gemma import embeddings_connector as package

    oracles = AV(
        package.Embeddings1DConnectorConfigurator.from_config({"transformer": section(version, registers=128)}),
        package.AudioEmbeddings1DConnectorConfigurator.from_config({"transformer": section(version, registers=128)}),
    )
    for name, oracle in (("video", oracles.video), ("audio", oracles.audio)):
        oracle.to(dtype).load_state_dict(head.connectors[name].state_dict(), strict=True)
    return oracles


@reference
@pytest.mark.parametrize("counts", [(11,), (11, 1, 16)], ids=["one", "batch"])
@pytest.mark.parametrize("version", VERSIONS)
def test_contexts_match_diffusers(diffusers, version, counts):
    head = random_head(version)
    states, mask = states_and_mask(counts)
    video, audio, _ = diffusers_oracle(version, head)(*left_padded(states, mask.long()), padding_side="left")
    got = head(states, mask)
    assert got.video.shape == (len(counts), 1024, head.connectors["video"].config.dim)
    assert_close(f"{version} video", got.video, video, 1e-5)
    assert_close(f"{version} audio", got.audio, audio, 1e-5)


@reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", VERSIONS)
def test_features_match_ltx_core(ltx_core, version, dtype):
    """Also in bfloat16, bit for bit: every operation rounds where ltx-core's does."""
    head = random_head(version).to(dtype)
    states, mask = states_and_mask(COUNTS, dtype=dtype)
    video, audio = ltx_core_extractor(version, head)(states, mask.long(), "left")
    got = head.projection(states, mask)
    if dtype == torch.bfloat16:
        assert torch.equal(got.video, video)
        assert torch.equal(got.audio, audio)
    else:
        assert_close(f"{version} video", got.video, video, 1e-5)
        assert_close(f"{version} audio", got.audio, audio, 1e-5)


@reference
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0)])
@pytest.mark.parametrize("version", VERSIONS)
def test_connectors_match_ltx_core(ltx_core, version, dtype, tolerance):
    head = random_head(version, registers=128).to(dtype)
    count, oracles = 37, ltx_core_connectors(version, head, dtype)
    mask = torch.arange(1024)[None] >= 1024 - count
    additive = ((mask.to(dtype) - 1) * torch.finfo(dtype).max)[:, None, None]
    generator = torch.Generator().manual_seed(2)
    for name, oracle in (("video", oracles.video), ("audio", oracles.audio)):
        connector = head.connectors[name]
        features = torch.randn((1, 1024, connector.config.dim), generator=generator).to(dtype)
        want, _ = oracle(features, additive)
        assert_close(f"{version} {name} padded", connector(features, mask), want, tolerance)
        trimmed = connector(features[:, -count:], mask[:, -count:])
        assert_close(f"{version} {name} trimmed", trimmed, want, tolerance)


@pytest.mark.parametrize("version", VERSIONS)
def test_padding_and_the_rest_of_the_batch_do_not_matter(version):
    head = random_head(version)
    states, mask = states_and_mask(COUNTS)
    together = head(states, mask)
    for i, count in enumerate(COUNTS):
        alone = head(states[i : i + 1, -count:], mask[i : i + 1, -count:])
        assert_close(f"video {count}", together.video[i : i + 1], alone.video, 1e-5)
        assert_close(f"audio {count}", together.audio[i : i + 1], alone.audio, 1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_v1_normalises_over_the_prompt_and_v2_over_the_token(version):
    head = random_head(version)
    states, mask = states_and_mask((16,))
    changed = states.clone()
    changed[:, 5] *= -3
    before, after = head.projection(states, mask), head.projection(changed, mask)
    others = [i for i in range(16) if i != 5]
    moved = relative_error(after.video[:, others], before.video[:, others])
    assert (moved > 1e-3) if version == "2.0" else (moved == 0)
    assert relative_error(after.video[:, 5], before.video[:, 5]) > 1e-3


def test_v2_features_of_padding_are_the_bias():
    head = random_head("2.3")
    states, mask = states_and_mask((3,))
    features = head.projection(states, mask).audio
    assert torch.equal(features[~mask], head.projection.audio_aggregate_embed.bias.expand(13, -1))


def test_an_empty_prompt_is_finite_in_v1_with_one_token():
    """All channels of the one BOS token may even be equal."""
    head = random_head("2.0")
    context = head(torch.full((1, 1, DIM, STATES), 3.0), torch.ones(1, 1, dtype=torch.bool))
    assert bool(context.video.isfinite().all())


@pytest.mark.parametrize(("length", "tokens"), [(1, 1024), (1024, 1024), (1025, 1032), (1032, 1032)])
def test_contexts_have_whole_sets_of_registers_and_at_least_1024_tokens(length, tokens):
    connector = random_head("2.0").connectors["video"]
    features, mask = torch.randn(1, length, DIM), torch.ones(1, length, dtype=torch.bool)
    filled = connector._fill_with_registers(features, mask)
    assert filled.shape == (1, tokens, DIM)
    assert torch.equal(filled[:, :length], features)
    want = (
        torch.stack([connector.learnable_registers[p % 8] for p in range(length, tokens)]) if tokens > length else None
    )
    assert want is None or torch.equal(filled[0, length:], want)


def test_tokens_move_to_the_front_in_order_wherever_the_padding_is():
    connector = random_head("2.0").connectors["video"]
    features = torch.randn(2, 6, DIM)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]])
    filled = connector._fill_with_registers(features, mask.bool())
    assert torch.equal(filled[0, :3], features[0, [1, 2, 4]])
    assert torch.equal(filled[1, :3], features[1, [0, 1, 5]])
    assert torch.equal(filled[:, 3], connector.learnable_registers[3].expand(2, -1))
    assert torch.equal(connector(features, mask), connector(features, mask.bool()))


def test_connect_takes_features_made_elsewhere():
    head = random_head("2.3").to(torch.bfloat16)
    states, mask = states_and_mask((16,), dtype=torch.bfloat16)
    features = head.projection(states, mask)
    want = head(states, mask)
    got = head.connect(features.map(lambda x: x.float()), mask)
    assert torch.equal(got.video, want.video)
    assert torch.equal(got.audio, want.audio)
    assert got.video.dtype == torch.bfloat16


def test_the_feed_forward_bias_can_be_absent():
    without = TextConfig.from_config({"transformer": section("2.3") | {"connector_ff_bias": False}})
    with torch.device("meta"):
        names = Connector(without.connectors.audio).state_dict()
    assert not [name for name in names if ".ff." in name and name.endswith("bias")]


@pytest.mark.parametrize("version", VERSIONS)
def test_tensor_names_and_shapes_are_those_of_the_released_checkpoints(version):
    with torch.device("meta"):
        head = TextHead(TextConfig.from_config({"transformer": KEYS[version]["config"]}), 49)
    got = {checkpoint_name(name): list(value.shape) for name, value in head.state_dict().items()}
    assert got == KEYS[version]["connectors"] | KEYS[version]["feature_extractor"]
