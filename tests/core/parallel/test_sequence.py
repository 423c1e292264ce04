"""Inputs shared out by field, tables in two forms, and what is refused."""

from dataclasses import replace

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.parallel.context import SINGLE, WHOLE, ParallelContext, Split
from ltx2_engine.ltx2_core.parallel.sequence import shard
from ltx2_engine.ltx2_core.transformer.inputs import StreamInput, Timesteps
from ltx2_engine.ltx2_core.transformer.rope import CrossRotary, Rotary

HEADS = 4


def rank_of(rank, size):
    return ParallelContext(rank, size, collectives=object())


def stream(count=10, levels=10, text=10, batch=2):
    """Every axis that is not the tokens' is as long as theirs, where that can be."""
    tables = [Rotary(*torch.randn(2, 1, HEADS, count, 8)) for _ in range(2)]
    return StreamInput(
        latent=torch.randn(batch, count, 16),
        timesteps=Timesteps(torch.rand(batch, levels), torch.randint(levels, (batch, count)), torch.rand(batch)),
        context=torch.randn(batch, text, 32),
        rotary=tables[0],
        cross_rotary=CrossRotary.whole(tables[1]),
        attention_bias=torch.randn(batch, 1, count, count),
        context_bias=torch.randn(batch, 1, count, text),
        keyframes_mask=torch.ones(1, count, 1),
    )


def per_token(one):
    """What belongs to tokens, with the tokens' axis in front."""
    return [
        one.latent.movedim(1, 0),
        one.timesteps.index.movedim(1, 0),
        *(table.movedim(2, 0) for rotary in (one.rotary, one.cross_rotary.local) for table in (rotary.cos, rotary.sin)),
        one.context_bias.movedim(2, 0),
        one.keyframes_mask.movedim(1, 0),
    ]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("count", [2, 3, 5, 8, 10])
def test_shares_are_contiguous_and_filled_up_with_zeros(size, count):
    whole = AV(stream(count), stream(count))
    shares = [shard(whole, rank_of(rank, size)) for rank in range(size)]
    share = -(-count // size)
    assert sum(one.video.split.valid for one in shares) == count
    for want, *parts in zip(per_token(whole.video), *(per_token(one.video) for one in shares), strict=True):
        assert {len(part) for part in parts} == {share}
        together = torch.cat(parts)
        assert torch.equal(together[:count], want)
        assert not together[count:].any()
    for one in shares:
        assert one.audio is whole.audio
        video = one.video
        assert video.attention_bias is whole.video.attention_bias
        assert video.timesteps.rows is whole.video.timesteps.rows
        assert video.timesteps.sigma is whole.video.timesteps.sigma
        assert video.context is whole.video.context
        assert video.rotary.cos.is_contiguous()


def test_the_full_tables_stay_and_are_the_same_at_one_rank():
    whole = AV(stream(), stream())
    assert whole.video.cross_rotary.local is whole.video.cross_rotary.full
    assert shard(whole, SINGLE) is whole
    once = shard(whole, rank_of(1, 2))
    assert once.video.cross_rotary.full is whole.video.cross_rotary.full
    assert once.video.cross_rotary.local.cos.shape[2] == 5
    again = shard(once, once.video.split.context)
    assert again.video is once.video
    assert again.video.cross_rotary.full is whole.video.cross_rotary.full


def test_what_is_not_there_is_not_shared_out():
    bare = replace(stream(), attention_bias=None, context_bias=None, keyframes_mask=None)
    bare = replace(bare, timesteps=replace(bare.timesteps, index=None))
    video = shard(AV(bare, None), rank_of(0, 2)).video
    assert (video.context_bias, video.keyframes_mask, video.timesteps.index) == (None, None, None)
    sound = AV(None, stream())
    assert shard(sound, rank_of(0, 2)) is sound


def test_a_bias_that_is_one_for_all_tokens_stays():
    bias = torch.randn(2, 1, 1, 10)
    video = shard(AV(replace(stream(), context_bias=bias), None), rank_of(0, 2)).video
    assert video.context_bias is bias


def test_a_few_tokens_of_a_share_are_whole():
    """Kernels are tried on them, by every rank for itself."""
    few = shard(AV(stream(), stream()), rank_of(1, 4)).video.first(64)
    assert few.split is WHOLE
    assert few.latent.shape[1] == 3
    assert few.attention_bias.shape == (2, 1, 3, 3)
    assert few.cross_rotary.local.cos.shape[2] == 3


def test_ranks_that_cannot_share_the_heads_are_refused():
    with pytest.raises(ValueError, match=r"3 ranks cannot share 4 attention heads. Use 1, 2 or 4."):
        shard(AV(stream(), None), rank_of(0, 3))


def test_inputs_are_not_split_twice():
    once = shard(AV(stream(), None), rank_of(0, 2))
    with pytest.raises(ValueError, match="these tokens are split over 2 ranks"):
        shard(once, rank_of(0, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((2, 2, object()), "rank 2 is not among 2 ranks"),
        ((0, 2, None), "2 ranks need collectives"),
        ((0, 1, None, "ring"), "v2a 'ring' is not known; choose partial, heads, heads_late"),
    ],
)
def test_a_context_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ParallelContext(*fields)


def test_one_rank_is_given_back_what_it_gives():
    x = torch.randn(2, 6, 8)
    assert WHOLE.take(x, 1) is x
    assert WHOLE.to_heads(x, x) == (x, x)
    assert WHOLE.to_tokens(x) is x
    assert WHOLE.gather(x) is x
    assert WHOLE.own_heads(x, 2) is x
    assert WHOLE.gather_heads(x) is x
    assert Split().size == 1
