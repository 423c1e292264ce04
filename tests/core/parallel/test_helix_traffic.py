"""Which topologies fit, what they read a token, and which is chosen."""

import pytest
import torch
from ltx2_engine.ltx2_core.parallel.helix_topology import Attention, Decoder, Shares, Topology, check, topologies
from ltx2_engine.ltx2_core.parallel.helix_traffic import choose, describe, table, traffic

# the released sizes: five layers in six see 1024 positions
GEMMA3_12B = Decoder(3840, 15360, 262208, (Attention(40, 16, 8, 256, reach=1024), Attention(8, 16, 8, 256)))
# one head of keys in the global layers, which tensor parallelism can only repeat
ONE_KEY_HEAD = Decoder(3840, 15360, 262208, (Attention(40, 16, 8, 256, reach=1024), Attention(8, 16, 1, 512)))

GB = 1e9


@pytest.mark.parametrize(
    ("topology", "length", "weights", "cache"),
    [
        (Topology(), 2048, 23.53, 0.47),
        (Topology(), 4096, 23.53, 0.60),
        (Topology(), 65536, 23.53, 4.63),
        (Topology(4, 1), 4096, 5.88, 0.15),
        (Topology(4, 1), 65536, 5.88, 1.16),
        (Topology(1, 4), 4096, 8.15, 0.15),
        (Topology(1, 4), 65536, 8.15, 1.16),
        (Topology(2, 2), 65536, 6.64, 1.16),
        (Topology(8, 1), 65536, 2.94, 0.58),
    ],
    ids=lambda value: value.name if isinstance(value, Topology) else None,
)
def test_bytes_read_a_token_by_gemma_3_12b(topology, length, weights, cache):
    count = traffic(GEMMA3_12B, topology, length)
    assert count.weights / GB == pytest.approx(weights, abs=0.006)
    assert count.cache / GB == pytest.approx(cache, abs=0.006)


def test_gemma_3_reads_least_with_tensor_parallelism_at_every_length():
    for length in (128, 4096, 65536, 10**6):
        assert choose(GEMMA3_12B, 4, length) == Topology(4, 1)
        assert choose(GEMMA3_12B, 1, length) == Topology()


def test_one_key_head_reads_least_with_helix_once_keys_outweigh_projections():
    assert choose(ONE_KEY_HEAD, 4, 2048) == Topology(4, 1)
    assert choose(ONE_KEY_HEAD, 4, 10**6).context > 1


@pytest.mark.parametrize(
    ("choice", "want"), [("single", Topology()), ("tensor", Topology(4, 1)), ("helix", Topology(2, 2))]
)
def test_every_kind_can_be_chosen(choice, want):
    assert choose(GEMMA3_12B, 4, 4096, choice=choice) == want


def test_messages_name_what_fits():
    with pytest.raises(ValueError, match="no topology of kind helix fits this model on 1 GPUs"):
        choose(GEMMA3_12B, 1, 4096, choice="helix")
    with pytest.raises(ValueError, match="choose auto, single, tensor, helix"):
        choose(GEMMA3_12B, 4, 4096, choice="ring")
    with pytest.raises(ValueError, match=r"TP3 cannot share 16 query / 8 key heads\. Use another number"):
        check(Topology(3, 1), GEMMA3_12B)
    with pytest.raises(ValueError, match=r"Helix 16x2 cannot share .* Use another number of GPUs"):
        check(Topology(16, 2), GEMMA3_12B)
    with pytest.raises(ValueError, match=r"16 query / 1 key heads and .*\. Use TP4, Helix 1x4\."):
        check(Topology(2, 2), ONE_KEY_HEAD)


def test_topologies_of_sixteen_ranks():
    names = [topology.name for topology in topologies(GEMMA3_12B, 16)]
    assert names == ["TP16", "Helix 8x2", "Helix 4x4", "Helix 2x8", "Helix 1x16"]


@pytest.mark.parametrize("topology", topologies(GEMMA3_12B, 16), ids=lambda topology: topology.name)
def test_shares_cover_every_weight_once_and_heads_find_their_keys(topology):
    kind, heads = GEMMA3_12B.attentions[0], torch.arange(16)
    shares = [Shares.of(GEMMA3_12B, kind, topology, rank) for rank in range(16)]
    for field in ("output", "inner"):
        runs = [getattr(share, field) for share in shares]
        assert [run.start for run in runs[1:]] == [run.stop for run in runs[:-1]]
    for rank, share in enumerate(shares):
        queries = heads[share.query.start // 256 : share.query.stop // 256]
        keys = range(share.key.start // 256, share.key.stop // 256)
        # query head h reads key head h // 2; local head i reads local key head i // (heads / keys)
        group = len(queries) // len(keys)
        assert [keys[i // group] for i in range(len(queries))] == (queries // 2).tolist()
        # what a rank projects back is its context share of the heads that it attended
        part = len(queries) // topology.context
        first = queries[rank % topology.context * part].item()
        assert share.output == slice(first * 256, (first + part) * 256)


def test_what_is_sent_does_not_grow_with_the_context():
    sent = {length: traffic(GEMMA3_12B, Topology(2, 2), length).sent for length in (16, 4096, 10**6)}
    assert len(set(sent.values())) == 1
    assert traffic(GEMMA3_12B, Topology(), 4096).sent == 0


def test_table_has_a_row_for_every_topology_and_length():
    rows = table(GEMMA3_12B, [Topology(), Topology(4, 1), Topology(1, 4)], [4096, 65536]).splitlines()[2:]
    assert len(rows) == 6
    assert rows[0] == "| one GPU | 4,096 | 23.53 GB | 0.60 GB | 0.00 MB |"


def test_the_log_says_what_is_gained():
    assert describe(GEMMA3_12B, Topology(4, 1), 4096) == (
        "TP4 at 4,096 positions: 5.88 GB of weights and 0.15 GB of keys a token and GPU; "
        "one GPU: 23.53 GB of weights and 0.60 GB of keys"
    )
