"""Guidance passes over groups of ranks: the same bits on every rank and as one pass after the other."""

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.parallel.groups import ONE_GROUP, PassGroups, Topology
from ltx2_engine.ltx2_core.sampling.guidance import plan_passes
from ltx2_engine.ltx2_core.testing import assert_close

from .cases import ALL_PASSES, STRENGTHS

TOPOLOGIES = [(1, 2), (2, 1), (1, 4), (2, 2), (4, 1)]


@pytest.mark.parametrize("passes", STRENGTHS)
@pytest.mark.parametrize(("groups", "ulysses"), TOPOLOGIES)
def test_guidance_over_groups_is_that_of_one_pass_after_the_other(ranks, groups, ulysses, passes):
    for stream in ("video", "audio"):
        name = f"{passes} passes/{stream}"
        want = ranks[ulysses][0][f"guided/1x{ulysses}/{name}"]
        assert float(want.std()) > 0.1
        for results in ranks[groups * ulysses]:
            got = results[f"guided/{groups}x{ulysses}/{name}"]
            assert torch.equal(got, want), name
            assert_close(name, got, ranks[1][0][f"guided/1x1/{name}"], 1e-5)


def test_ranks_belong_to_one_group_of_either_kind():
    topology = Topology(2, 3)
    assert topology.within == ((0, 1, 2), (3, 4, 5))
    assert topology.across == ((0, 3), (1, 4), (2, 5))


def test_conditional_and_perturbed_pass_meet():
    """They are one up to the first perturbed block."""
    passes = plan_passes(AV(STRENGTHS[4], STRENGTHS[4]))
    first, second = ([one.name for one in PassGroups(own, 2, object()).of(passes)] for own in range(2))
    assert (first, second) == (["cond", "perturbed"], ["uncond", "isolated"])


def test_every_pass_has_one_group():
    for count in range(2, 6):
        names = [one.name for own in range(count) for one in PassGroups(own, count, object()).of(ALL_PASSES)]
        assert sorted(names) == sorted(one.name for one in ALL_PASSES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((2, 2, object()), "group 2 is not among 2 groups"),
        ((0, 2, None), "several need collectives"),
        ((0, 1, object()), "one by itself has none"),
    ],
)
def test_groups_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PassGroups(*fields)


def test_one_group_exchanges_nothing():
    velocities = [AV(torch.ones(1), torch.ones(2))]
    assert ONE_GROUP.gather(velocities, 1, velocities[0]) == velocities
