"""Helix's functions against attention on one rank: ranks are threads, values are float64."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ltx2_engine.ltx2_core.parallel import helix
from ltx2_engine.ltx2_core.parallel.helix_cache import OwnedKeys
from ltx2_engine.ltx2_core.parallel.helix_exchange import Alone
from ltx2_engine.ltx2_core.parallel.helix_rows import Rows

HEADS, KV_HEADS, DIM = 12, 3, 8


class ThreadGroup:
    """Exchanges between threads of one process."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.posts = [None] * size

    def run(self, function):
        """``function(exchange)`` on every rank at once; the results in the order of ranks."""
        results = [None] * self.size

        def target(rank):
            try:
                results[rank] = function(ThreadExchange(self, rank))
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return results


class ThreadExchange:
    def __init__(self, group, rank):
        self.group, self.rank, self.size = group, rank, group.size
        self.calls = []

    def _posts(self, kind, x):
        self.calls.append((kind, x.numel() * x.element_size()))
        self.group.posts[self.rank] = x
        self.group.barrier.wait()
        posts = list(self.group.posts)
        self.group.barrier.wait()
        return posts

    def all_to_all(self, parts):
        return torch.stack([post[self.rank] for post in self._posts("all_to_all", parts)])

    def all_gather(self, x):
        return torch.stack(self._posts("all_gather", x))

    def reduce_scatter(self, parts):
        return sum(post[self.rank] for post in self._posts("reduce_scatter", parts))

    def all_reduce(self, x):
        return sum(self._posts("all_reduce", x))


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def full_attention(q, k, v, scale, visible):
    """[B, H, T, D] and keys of fewer heads to [B, T, H, D], as written in any textbook."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~visible, -math.inf)
    return (scores.softmax(-1).nan_to_num(0) @ v).transpose(1, 2)


def mask_of(batch, queries, keys, *, window=None, pads=()):
    """[B, 1, T, S]: causal for the last queries of a sequence, with a window, and prompts padded on the left."""
    query, key = torch.arange(keys - queries, keys).unsqueeze(1), torch.arange(keys)
    visible = (key <= query) & (key > query - (window or keys + 1))
    padded = torch.tensor([*pads, *[0] * (batch - len(pads))])
    return visible & (key >= padded[:, None, None, None])


# owners --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 120), st.integers(0, 60))
def test_every_position_has_one_owner_and_counts_are_closed_forms(ranks, block, start, more):
    stop = start + more
    owners = [helix.OwnerMap(rank, ranks, block) for rank in range(ranks)]
    held = [owner.positions(start, stop).tolist() for owner in owners]
    assert sorted(position for positions in held for position in positions) == list(range(start, stop))
    for owner, positions in zip(owners, held, strict=True):
        assert positions == [p for p in range(start, stop) if owner.owner(p) == owner.rank]
        assert owner.count(stop) - owner.count(start) == len(positions)
    counts = [owner.count(stop) for owner in owners]
    assert max(counts) - min(counts) <= block


@pytest.mark.parametrize(("rank", "ranks", "block"), [(2, 2, 16), (-1, 2, 16), (0, 1, 0)])
def test_impossible_owners_are_refused(rank, ranks, block):
    with pytest.raises(ValueError, match="not possible"):
        helix.OwnerMap(rank, ranks, block)


# attention -----------------------------------------------------------------------------------------------------------


CASES = {
    "uneven shards": {"ranks": 3, "keys": 37, "queries": 37, "block": 5},
    "one token": {"ranks": 4, "keys": 101, "queries": 1, "block": 8},
    "empty ranks": {"ranks": 4, "keys": 9, "queries": 9, "block": 8},
    "window": {"ranks": 4, "keys": 50, "queries": 20, "block": 4, "window": 7},
    "window that leaves ranks without keys": {"ranks": 4, "keys": 64, "queries": 1, "block": 8, "window": 5},
    "left padding": {"ranks": 2, "keys": 40, "queries": 40, "block": 3, "batch": 3, "pads": (11, 0, 37)},
    "left padding, window, batch": {
        "ranks": 6,
        "keys": 45,
        "queries": 7,
        "block": 2,
        "batch": 3,
        "window": 9,
        "pads": (40, 3),
    },
    "one rank": {"ranks": 1, "keys": 23, "queries": 5, "block": 4, "window": 6, "batch": 2, "pads": (20,)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_shared_attention_equals_full_attention(case):
    ranks, keys, queries, batch = case["ranks"], case["keys"], case["queries"], case.get("batch", 1)
    q = random(batch, HEADS, queries, DIM, seed=1)
    k, v = random(batch, KV_HEADS, keys, DIM, seed=2), random(batch, KV_HEADS, keys, DIM, seed=3)
    visible = mask_of(batch, queries, keys, window=case.get("window"), pads=case.get("pads", ()))

    def on_rank(exchange):
        own = helix.OwnerMap(exchange.rank, ranks, case["block"]).positions(0, keys)
        part = helix.partial_attention(q, k[:, :, own], v[:, :, own], 0.3, visible[..., own])
        return helix.merge_over_heads(part, exchange)

    got = torch.cat(ThreadGroup(ranks).run(on_rank), dim=2)
    want = full_attention(q, k, v, 0.3, visible)
    assert (got - want).abs().max() < 1e-12


def test_a_rank_without_keys_says_so_and_does_not_count():
    q, none = random(2, HEADS, 3, DIM), random(2, KV_HEADS, 0, DIM)
    empty = helix.partial_attention(q, none, none, 1.0)
    assert torch.equal(empty.out, torch.zeros(2, 3, HEADS, DIM, dtype=q.dtype))
    assert bool((empty.lse == -math.inf).all())
    k, v = random(2, KV_HEADS, 6, DIM, seed=1), random(2, KV_HEADS, 6, DIM, seed=2)
    some = helix.partial_attention(q, k, v, 1.0)
    both = helix.Partial(torch.stack([empty.out, some.out]), torch.stack([empty.lse, some.lse]))
    assert torch.equal(helix.combine(both), some.out)


def test_rows_that_see_nothing_are_zero_everywhere():
    q, k = random(1, HEADS, 4, DIM), random(1, KV_HEADS, 5, DIM)
    part = helix.partial_attention(q, k, k, 1.0, torch.zeros(1, 1, 4, 5, dtype=torch.bool))
    both = helix.Partial(torch.stack([part.out] * 2), torch.stack([part.lse] * 2))
    assert torch.equal(helix.combine(both), torch.zeros(1, 4, HEADS, DIM, dtype=q.dtype))


def test_large_scores_do_not_overflow():
    q, k, v = random(1, HEADS, 2, DIM) * 300, random(1, KV_HEADS, 12, DIM, seed=1), random(1, KV_HEADS, 12, DIM, seed=2)
    halves = [helix.partial_attention(q, k[:, :, part], v[:, :, part], 1.0) for part in (slice(5), slice(5, None))]
    got = helix.combine(helix.Partial(*(torch.stack(pair) for pair in zip(*halves, strict=True))))
    want = full_attention(q, k, v, 1.0, torch.ones(1, 1, 2, 12, dtype=torch.bool))
    assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_outputs_keep_statistics_in_float32(dtype):
    q, k, v = (random(2, heads, 9, DIM, seed=i, dtype=dtype) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    part = helix.partial_attention(q, k, v, 0.3)
    assert (part.out.dtype, part.lse.dtype) == (dtype, torch.float32)
    want = full_attention(*(x.double() for x in (q, k, v)), 0.3, torch.ones(1, 1, 9, 9, dtype=torch.bool))
    assert (part.out.double() - want).abs().max() < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_packing_is_exact_and_sends_each_rank_its_heads(dtype):
    part = helix.Partial(random(2, 3, HEADS, DIM, dtype=dtype), random(2, 3, HEADS, seed=1).to(dtype).to(torch.float32))
    if dtype == torch.float64:
        part = part._replace(lse=part.lse.double())
    sent = helix.pack_heads(part, 4)
    assert sent.shape == (4, 2, 3, HEADS // 4, DIM * dtype.itemsize + part.lse.itemsize)
    back = helix.unpack_heads(sent, dtype)
    for rank in range(4):
        heads = slice(rank * 3, rank * 3 + 3)
        assert torch.equal(back.out[rank], part.out[:, :, heads])
        assert torch.equal(back.lse[rank], part.lse[:, :, heads])


def test_heads_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="12 heads cannot be shared by 5 ranks"):
        helix.pack_heads(helix.Partial(random(1, 1, HEADS, DIM), random(1, 1, HEADS)), 5)


def test_one_exchange_whatever_the_context():
    def on_rank(exchange, keys):
        q, k = random(1, HEADS, 1, DIM), random(1, KV_HEADS, keys, DIM)
        helix.merge_over_heads(helix.partial_attention(q, k, k, 1.0), exchange)
        return exchange.calls

    calls = [ThreadGroup(2).run(lambda exchange, keys=keys: on_rank(exchange, keys)) for keys in (3, 300)]
    assert calls[0] == calls[1] == [[("all_to_all", HEADS * (DIM + 1) * 8)]] * 2


# the cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 6, 40])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("calls", [(30, *[1] * 40), (5, 1, 1, 300, 1, 7), (1,) * 20])
def test_cached_attention_equals_full_attention_call_by_call(window, ranks, calls):
    total = sum(calls)
    q = random(2, HEADS, total, DIM, seed=1)
    k, v = random(2, KV_HEADS, total, DIM, seed=2), random(2, KV_HEADS, total, DIM, seed=3)

    def on_rank(exchange):
        cache, outputs = OwnedKeys(helix.OwnerMap(exchange.rank, ranks, 4), window), []
        for count in calls:
            start = cache.get_seq_length()
            new = slice(start, start + count)
            assert cache.get_mask_sizes(count) == (start + count, 0)
            visible = mask_of(2, count, start + count, window=window, pads=(3,))
            keys, values = cache.update(k[:, :, new], v[:, :, new])
            own = cache.positions()
            assert torch.equal(keys, k[:, :, own])
            assert torch.equal(values, v[:, :, own])
            part = helix.partial_attention(q[:, :, new], keys, values, 0.4, visible[..., own])
            outputs.append(helix.merge_over_heads(part, exchange))
        return torch.cat(outputs, dim=1)

    got = torch.cat(ThreadGroup(ranks).run(on_rank), dim=2)
    want = full_attention(q, k, v, 0.4, mask_of(2, total, total, window=window, pads=(3,)))
    assert (got - want).abs().max() < 1e-12


def test_windows_forget_what_no_token_sees():
    cache = OwnedKeys(helix.OwnerMap(), reach=10)
    for count in (2000, *[1] * 1000):
        cache.update(*[random(1, 1, count, 1)] * 2)
    assert cache.keys.shape[2] < 600
    assert cache.get_seq_length() == 3000


def test_one_rank_writes_a_new_token():
    caches = [OwnedKeys(helix.OwnerMap(rank, 3, 2)) for rank in range(3)]
    for position in range(7):
        held = [
            cache.update(*[torch.full((1, 1, 1, 1), float(position))] * 2)[0].flatten().tolist() for cache in caches
        ]
    assert held == [[0, 1, 6], [2, 3], [4, 5]]
    for cache in caches:
        cache.reset()
    assert [cache.get_seq_length() for cache in caches] == [0, 0, 0]


# rows of tokens ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 23))
@settings(max_examples=30, deadline=None)
def test_rows_are_summed_sliced_and_gathered(ranks, count):
    partials = random(ranks, count, 3)

    def on_rank(exchange):
        rows = Rows(count, exchange)
        own = rows.reduce(partials[exchange.rank])
        assert own.shape == (math.ceil(count / ranks), 3)
        return own, rows.slice(partials.sum(0)), rows.gather(own)

    for own, sliced, gathered in ThreadGroup(ranks).run(on_rank):
        assert (own - sliced).abs().max() < 1e-12
        assert (gathered - partials.sum(0)).abs().max() < 1e-12


def test_a_residual_that_has_not_begun_stays_none():
    hidden, residual = random(5, 2), random(5, 2, seed=1)
    rows = Rows(5, Alone())
    assert rows.slice_with(hidden, None)[1] is None
    sliced, kept = rows.slice_with(hidden, residual)
    assert torch.equal(sliced, rows.slice(hidden))
    assert torch.equal(kept, residual)
    with pytest.raises(TypeError):
        rows.slice_with(hidden)  # who gives no residual calls slice


@pytest.mark.parametrize("count", [1, 5, 8, 9])
def test_layers_on_slices_equal_dense_layers_and_compute_each_row_once(count):
    ranks, layers, width = 4, 3, 8
    weights = random(layers, 2, width, width) * 0.3
    hidden = random(count, width, seed=5)

    def norm(x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)

    want = hidden
    for mixing, inner in weights:
        want = want + norm(norm(want) @ mixing)
        want = want + norm((norm(want) @ inner).tanh())

    def on_rank(exchange):
        rows, computed = Rows(count, exchange), 0
        part = slice(exchange.rank * width // ranks, (exchange.rank + 1) * width // ranks)
        own, residual = rows.slice_with(hidden, None)
        for mixing, inner in weights:
            residual = own if residual is None else residual
            mixed = rows.reduce(norm(rows.gather(own))[:, part] @ mixing[part])
            own = residual + norm(mixed)
            computed += len(own)
            own = residual = own + norm((norm(own) @ inner).tanh())
        return rows.gather(own), computed

    for got, computed in ThreadGroup(ranks).run(on_rank):
        assert (got - want).abs().max() < 1e-12
        assert computed == layers * math.ceil(count / ranks)
