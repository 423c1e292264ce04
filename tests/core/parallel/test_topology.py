"""How ranks share passes: the formula's choices, against the measured times that it was fitted to (H200, bf16)."""

import pytest
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.config.transformer import TransformerConfig
from ltx2_engine.ltx2_core.parallel.groups import Topology
from ltx2_engine.ltx2_core.parallel.topology import StageWork, choose_topology, pass_weights, step_seconds
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes

CONFIG = TransformerConfig.from_config(released_config("2.3"))


def passes_of(**strengths):
    guidance = StreamGuidance(stg_blocks=(28,), **strengths)
    return plan_passes(AV(guidance, guidance))


ONE, THREE, FOUR = passes_of(), passes_of(cfg=3.0, modality=3.0), passes_of(cfg=3.0, stg=1.0, modality=3.0)


def work(tokens, **options):
    return StageWork(tokens, 1024, CONFIG, **options)


# tokens -> milliseconds of a pass on 1, 2, 4 and 8 GPUs
TIMES = {
    6144: (344, 201, 118, 75),
    8160: (469, 266, 152, 92),
    15360: (997, 541, 292, 163),
    24576: (1860, 987, 518, 277),
}


@pytest.mark.parametrize("tokens", TIMES)
def test_the_formula_is_near_the_measured_passes(tokens):
    for ranks, want in zip((1, 2, 4, 8), TIMES[tokens], strict=True):
        assert work(tokens).pass_seconds(ranks) * 1000 == pytest.approx(want, rel=0.09)


@pytest.mark.parametrize(
    ("tokens", "share"), [(6144, 0.90), (8160, 0.90), (15360, 0.915), (24576, 0.93), (32640, 0.94)]
)
def test_a_pass_without_audio_video_attention_costs_less(tokens, share):
    assert work(tokens).isolated_share() == pytest.approx(share, abs=0.005)


def test_equal_beginnings_count_once():
    assert pass_weights(FOUR, 48, 0.915) == pytest.approx(1 + 1 + 20 / 48 + 0.915)
    assert pass_weights(FOUR[0::2], 48, 0.915) == pytest.approx(1 + 20 / 48)
    assert pass_weights(FOUR[1::2], 48, 0.915) == pytest.approx(1.915)
    # without the conditional pass there is nothing to begin from
    assert pass_weights(FOUR[2:3], 48, 0.915) == 1
    assert pass_weights((), 48, 0.915) == 0


EXAMPLES = [
    (8160, THREE, 4, False, Topology(1, 4), 456),
    (8160, FOUR, 4, False, Topology(4, 1), 469),
    (15360, FOUR, 4, True, Topology(1, 4), 973),
    (24576, FOUR, 8, True, Topology(1, 8), 927),
    (24576, FOUR, 8, False, Topology(4, 2), 987),
    (24576, THREE, 8, False, Topology(1, 8), 831),
]


@pytest.mark.parametrize(("tokens", "passes", "ranks", "shared", "want", "milliseconds"), EXAMPLES)
def test_the_quickest_topology_is_chosen(tokens, passes, ranks, shared, want, milliseconds):
    choice = choose_topology(work(tokens), passes, ranks, share_prefixes=shared)
    assert choice.topology == want
    costs = step_seconds(work(tokens), passes, ranks, share_prefixes=shared)
    assert costs[want] * 1000 == pytest.approx(milliseconds, rel=0.06)
    assert f"{len(passes)} passes over {tokens:,} tokens" in choice.reason


def test_one_pass_belongs_to_all_ranks_whatever_was_asked_for():
    assert choose_topology(work(8160), ONE, 4, "4x1").topology == Topology(1, 4)


def test_the_user_may_choose():
    choice = choose_topology(work(24576), FOUR, 8, "2x4")
    assert (choice.topology, choice.reason) == (Topology(2, 4), "chosen by the user")


def test_a_slow_link_takes_passes_apart():
    assert choose_topology(work(15360), FOUR, 4).topology == Topology(1, 4)
    assert choose_topology(work(15360, link_speed=20e9), FOUR, 4).topology == Topology(4, 1)


def test_sound_alone_has_a_topology():
    assert choose_topology(work(0), FOUR, 2).topology in (Topology(1, 2), Topology(2, 1))
