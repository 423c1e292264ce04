"""ComfyUI's CONDITIONING in its four shapes, and every way in which it can be wrong."""

import pytest
import torch
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.config.text import TextConfig
from ltx2_engine.ltx2_core.text.native import ConditioningError, split_conditioning

CONFIGS = {version: TextConfig.from_config(released_config(version)) for version in ("2.0", "2.3", "2.5")}
RAW = {"pooled_output": None, "unprocessed_ltxav_embeds": True, "frame_rate": 24.0}
PROCESSED = {"pooled_output": None}


def entry(tokens, width, extras):
    return [[torch.arange(float(tokens * width)).view(1, tokens, width), dict(extras)]]


def test_raw_2_0_shares_its_features():
    conditioning = entry(7, 3840, RAW)
    parts, needs_connector, mask = split_conditioning(conditioning, CONFIGS["2.0"])
    assert needs_connector
    assert parts.video is parts.audio
    assert torch.equal(parts.video, conditioning[0][0])
    assert mask.tolist() == [[True] * 7]


@pytest.mark.parametrize("version", ["2.3", "2.5"])
def test_raw_2_3_is_video_then_audio(version):
    conditioning = entry(7, 6144, RAW)
    parts, needs_connector, mask = split_conditioning(conditioning, CONFIGS[version])
    assert needs_connector
    assert torch.equal(parts.video, conditioning[0][0][..., :4096])
    assert torch.equal(parts.audio, conditioning[0][0][..., 4096:])
    assert mask.tolist() == [[True] * 7]


@pytest.mark.parametrize(("version", "width", "video"), [("2.0", 7680, 3840), ("2.3", 6144, 4096)])
def test_processed_text_is_used_as_it_is(version, width, video):
    extras = PROCESSED | {"attention_mask": torch.ones(1, 1024)}
    conditioning = entry(1024, width, extras)
    parts, needs_connector, mask = split_conditioning(conditioning, CONFIGS[version])
    assert not needs_connector
    assert mask is None
    assert torch.equal(torch.cat([parts.video, parts.audio], -1), conditioning[0][0])
    assert parts.video.shape == (1, 1024, video)


def test_masked_raw_tokens_are_removed():
    conditioning = entry(4, 6144, RAW | {"attention_mask": torch.tensor([[0, 1, 0, 1]])})
    parts, _, mask = split_conditioning(conditioning, CONFIGS["2.3"])
    assert torch.equal(parts.audio, conditioning[0][0][:, [1, 3], 4096:])
    assert mask.tolist() == [[True, True]]


@pytest.mark.parametrize(
    ("version", "conditioning", "message"),
    [
        ("2.3", [], "is empty"),
        ("2.3", None, "is empty"),
        ("2.3", entry(1, 6144, RAW) * 2, "has 2 entries; LTX-2 takes one prompt"),
        ("2.3", [[torch.zeros(1, 1, 6144)]], "not a pair"),
        ("2.3", [[None, RAW]], "holds NoneType"),
        ("2.3", [[torch.zeros(2, 1, 6144), RAW]], r"holds torch.float32 \(2, 1, 6144\)"),
        ("2.3", [[torch.zeros(1, 6144), RAW]], r"needed are floats of shape \(1, tokens, width\)"),
        ("2.3", [[torch.zeros(1, 1, 6144, dtype=torch.int64), RAW]], "holds torch.int64"),
        ("2.3", [[torch.zeros(1, 0, 6144), RAW]], "has no tokens"),
        ("2.3", entry(2, 6144, RAW | {"attention_mask": torch.zeros(1, 2)}), "has no tokens"),
        (
            "2.3",
            entry(2, 6144, RAW | {"attention_mask": torch.ones(1, 3)}),
            r"attention_mask is \(1, 3\); needed is \(1, 2\)",
        ),
        ("2.3", entry(2, 3840, RAW), "3840 wide .* version 2.3 or 2.5 and takes 6144 before and 6144 after"),
        ("2.0", entry(2, 6144, RAW), "6144 wide .* version 2.0 and takes 3840 before and 7680 after"),
        ("2.3", entry(1024, 7680, PROCESSED), "7680 wide .* version 2.3 or 2.5"),
        ("2.0", entry(1024, 3840, PROCESSED), "unprocessed_ltxav_embeds flag is missing: encode again"),
        ("2.3", entry(77, 6144, PROCESSED), "77 tokens; .* Saving a conditioning loses the flag"),
        ("2.3", entry(1025, 6144, PROCESSED), "1025 tokens"),
        ("2.3", entry(1024, 6144, PROCESSED | {"attention_mask": torch.eye(1, 1024)}), "masks part"),
    ],
)
def test_unusable_conditionings_say_why(version, conditioning, message):
    with pytest.raises(ConditioningError, match=message):
        split_conditioning(conditioning, CONFIGS[version])
