"""How often ranks exchange something, and how many bytes: counted by collectives of which the others are not there."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.parallel.context import ParallelContext
from ltx2_engine.ltx2_core.sampling.guidance import GuidancePass

from .cases import ALL_PASSES, COND, GATHERED, ISOLATED, PERTURBED, Case, build, evaluate, model_of

SIZE, BLOCKS, HEADS = 4, 3, 4
DIM, AUDIO_DIM, CHANNELS, AUDIO_TOKENS = 128, 64, 16, 18
SHARE = 24 // SIZE


class Counted:
    """Collectives of one rank that notes name and bytes sent to the others, and hands on what it is given."""

    def __init__(self, size):
        self.size, self.sent = size, []

    def all_to_all(self, x):
        assert x.is_contiguous()
        assert len(x) == self.size
        self.sent.append(("all_to_all", x.nbytes * (self.size - 1) // self.size))
        return x.clone()

    def all_gather(self, x):
        assert x.is_contiguous()
        self.sent.append(("all_gather", x.nbytes * (self.size - 1)))
        return x.expand(self.size, *x.shape).clone()


@pytest.fixture(scope="module")
def model():
    return model_of("2.3", torch.bfloat16)


def sent(model, case, how="partial", rank=0):
    counted = Counted(SIZE)
    patched, context = build(how, ParallelContext(rank, SIZE, counted))
    with torch.inference_mode(), patched:
        evaluate(model, case, context)
    return counted.sent


# what a rank sends, in bf16: P - 1 of P pieces, or one piece to P - 1 others
PACKED = ("all_to_all", 3 * SHARE * DIM * 2 * (SIZE - 1) // SIZE)
BACK = ("all_to_all", SHARE * DIM * 2 * (SIZE - 1) // SIZE)
PARTS = ("all_gather", AUDIO_TOKENS * (AUDIO_DIM * 2 + HEADS * 4) * (SIZE - 1))
KEYS = ("all_to_all", 2 * SHARE * AUDIO_DIM * 2 * (SIZE - 1) // SIZE)
SOUND = ("all_gather", AUDIO_TOKENS * AUDIO_DIM * 2 // SIZE * (SIZE - 1))
VELOCITY = ("all_gather", SHARE * CHANNELS * 2 * (SIZE - 1))
TABLE = ("all_gather", SHARE * AUDIO_DIM // 2 * 2 * (SIZE - 1))


@pytest.mark.parametrize("rank", range(SIZE))
def test_a_block_exchanges_tokens_and_results_and_no_tables(model, rank):
    """The table of the documentation: 3 a block with merged parts, 4 with heads, one for the prediction."""
    assert sent(model, Case(), "partial", rank) == BLOCKS * [PACKED, BACK, PARTS] + [VELOCITY]
    assert sent(model, Case(), "heads", rank) == BLOCKS * [PACKED, BACK, KEYS, SOUND] + [VELOCITY]


def test_keys_that_are_rotated_late_ask_nobody_for_tables(model):
    assert sent(model, Case(), "heads_late") == sent(model, Case(), "heads")


def test_gathered_tables_would_be_seen(model):
    """What the two forms of the tables save: two collectives a block, as many bytes as the keys."""
    counts = sent(model, Case(), GATHERED)
    assert counts == BLOCKS * [PACKED, BACK, TABLE, TABLE, KEYS, SOUND] + [VELOCITY]


def test_levels_masks_and_marks_are_not_exchanged(model):
    plain = sent(model, Case(kept=False))
    assert sent(model, Case(weighted=True)) == plain
    assert sent(model_of("2.5", torch.bfloat16), Case(label="2.5")) == plain


@pytest.mark.parametrize(
    ("one", "blocks"),
    [
        (PERTURBED, [[PACKED, BACK, PARTS], [PARTS], [PACKED, BACK, PARTS]]),
        (ISOLATED, BLOCKS * [[PACKED, BACK]]),
        (GuidancePass("a2v", disable_a2v_cross_attn=True), BLOCKS * [[PACKED, BACK, PARTS]]),
        (GuidancePass("v2a", disable_v2a_cross_attn=True), BLOCKS * [[PACKED, BACK]]),
        (GuidancePass("sound", skip_audio_self_attn_blocks=(0, 1, 2)), BLOCKS * [[PACKED, BACK, PARTS]]),
        (replace(ISOLATED, skip_video_self_attn_blocks=(0, 1, 2)), BLOCKS * [[]]),
    ],
    ids=lambda value: value.name if isinstance(value, GuidancePass) else "",
)
@pytest.mark.parametrize("mode", ["split", "batched"])
def test_what_is_skipped_is_not_exchanged(model, one, blocks, mode):
    assert sent(model, Case(passes=(one,), mode=mode)) == [*chain(*blocks), VELOCITY]


def test_a_stream_that_is_held_exchanges_nothing_for_itself(model):
    assert sent(model, Case(enabled=AV(False, True))) == BLOCKS * [PARTS] + [VELOCITY]
    assert sent(model, Case(enabled=AV(True, False))) == BLOCKS * [PACKED, BACK] + [VELOCITY]


def test_samples_that_differ_exchange_like_those_that_compute_all(model):
    passes = (COND, PERTURBED)
    one = sent(model, Case())
    assert sent(model, Case(passes=passes, mode="batched")) == [(name, 2 * count) for name, count in one]


def test_passes_exchange_what_they_have_in_common_once(model):
    """Block after block, over the passes that differ by then; all of them share the first self attention."""
    cond, uncond, perturbed, isolated = [PACKED, BACK, PARTS], [PACKED, BACK, PARTS], [PARTS], [PACKED, BACK]
    first, apart = [PACKED, BACK, *2 * [PARTS]], cond + isolated + uncond
    assert sorted(sent(model, Case(passes=ALL_PASSES))) == sorted(
        [*first, *apart, *perturbed, *apart, *cond, *4 * [VELOCITY]]
    )


@pytest.mark.parametrize("rank", range(SIZE))
def test_all_ranks_exchange_alike(model, rank):
    """Also those that hold fewer tokens, or none."""
    for clip in (replace(Case().clip, frames=33, height=32, width=32), replace(Case().clip, width=96)):
        case = Case(clip=clip, kept=False, passes=ALL_PASSES)
        assert sent(model, case, rank=rank) == sent(model, case, rank=0)
