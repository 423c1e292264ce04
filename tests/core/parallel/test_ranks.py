"""Several ranks compute what one does: attention bit for bit, whole models but for the order of sums."""

import pytest
import torch
from ltx2_engine.ltx2_core.testing import assert_close, relative_error

from .cases import ATTENTIONS, CASES, DTYPES, ROTATED, ROTATIONS

SIZES = (2, 4)
# of the merged parts, against keys in one piece
MERGED = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2**-7}


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_that_of_one_rank_bit_for_bit(ranks, size, name, dtype):
    (one,) = ranks[1]
    for results in ranks[size]:
        for key in (f"among/{name}/{dtype}", f"given/heads/{name}/{dtype}"):
            assert torch.equal(results[key], one[key]), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_to_parts_of_the_keys_is_that_to_all(ranks, size, name, dtype):
    key = f"given/partial/{name}/{dtype}"
    (one,) = ranks[1]
    for results in ranks[size]:
        assert results[key].dtype == DTYPES[dtype]
        assert_close(key, results[key], one[key], MERGED[dtype])


@pytest.mark.parametrize("how", ["partial", "heads"])
@pytest.mark.parametrize("name", CASES)
def test_the_model_is_that_of_one_rank(ranks, size, name, how):
    (one,) = ranks[1]
    for results in ranks[size]:
        for part in CASES[name].passes:
            for stream in ("video", "audio"):
                want = one[f"{name}/partial/{part.name}/{stream}"]
                assert float(want.std()) > 0.1, "there is something to compare"
                got = results[f"{name}/{how}/{part.name}/{stream}"]
                assert_close(f"{name}, {part.name} {stream}", got, want, 1e-5)


def test_all_ranks_get_the_same_bits(ranks, size):
    first, *others = ranks[size]
    assert others
    for results in others:
        assert results.keys() == first.keys()
        for name, value in results.items():
            assert torch.equal(value, first[name]), name


def test_keys_may_be_rotated_before_or_behind_the_exchange_and_tables_gathered_or_kept(ranks, size):
    results = ranks[size][0]
    for name in ROTATED:
        for part in CASES[name].passes:
            for stream in ("video", "audio"):
                first, *others = (results[f"{name}/{how}/{part.name}/{stream}"] for how in ROTATIONS)
                assert all(torch.equal(first, other) for other in others), (name, stream)


def test_what_is_off_by_a_token_is_noticed(ranks):
    """The tolerance tells results apart: two cases that differ in one condition do not agree."""
    (one,) = ranks[1]
    assert relative_error(one["even/partial/cond/video"], one["one noise level/partial/cond/video"]) > 1e-2
