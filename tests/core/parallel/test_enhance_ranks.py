"""Prompt enhancement by two and four processes against one: the same text, scores that agree, and one stop for all."""

import json
import math

import pytest
import torch
from ltx2_engine.ltx2_core.enhancing_over_ranks import enhance_over_ranks, enhancing_topology
from ltx2_engine.ltx2_core.parallel.helix_topology import ONE, Topology
from ltx2_engine.ltx2_core.text.enhance import EnhanceError, EnhanceRequest, enhance, writer
from ltx2_engine.ltx2_core.text.tiny_gemma import write_tiny_gemma, write_tiny_gemma_file
from safetensors.torch import load_file

from . import enhance_rank
from .together import run_together

WORLD, TOPOLOGIES, REQUEST = enhance_rank.WORLD, enhance_rank.TOPOLOGIES, enhance_rank.REQUEST
LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    folder.chmod(0o700)
    write_tiny_gemma(folder / "gemma")
    write_tiny_gemma_file(folder / "gemma.safetensors", format="fp8")
    return folder


@pytest.fixture(scope="module")
def fleet(folder):
    """Texts and scores of every rank; all topologies run in one start of four processes."""
    script = enhance_rank.__file__
    run_together({f"rank {rank}": (script, rank, WORLD, folder) for rank in range(WORLD)})
    texts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(WORLD)]
    return texts, [load_file(folder / f"rank{rank}.safetensors") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def encoder(folder):
    return enhance_rank.load(folder / "gemma")


@pytest.fixture(scope="module")
def alone(encoder, folder):
    """What one process writes, with one thread as the ranks have: bits of sums depend on how many there are."""
    packed = enhance_rank.load(folder / "gemma.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            texts = {
                "words": enhance(*encoder, REQUEST),
                "picture": enhance(*encoder, REQUEST, enhance_rank.picture()),
                "packed": enhance(*packed, REQUEST),
            }
            return texts, enhance_rank.forced_scores(writer(encoder[0]))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_rank_writes_what_one_process_does(name, fleet, alone):
    # no scores of these requests are nearly equal
    for texts in fleet[0]:
        assert {kind: texts[name][kind] for kind in ("words", "picture")} == {
            kind: alone[0][kind] for kind in ("words", "picture")
        }
        assert texts[name].get("packed", alone[0]["packed"]) == alone[0]["packed"]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_scores_under_teacher_forcing_equal_one_processs(name, fleet, alone):
    want = alone[1]
    assert want.std() > 0.1
    for scores in fleet[1]:
        assert (scores[name] - want).abs().max() < 1e-4
        assert torch.equal(scores[name], fleet[1][0][name])


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_no_rank_repeats_anothers_rows(name, fleet):
    """The prompt is shared by tokens, single ones by weights."""
    want = [math.ceil(40 / TOPOLOGIES[name].size)] * LAYERS + [1] * LAYERS * 5
    assert all(texts[name]["rows"] == want for texts in fleet[0])


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_where_one_rank_stops_all_do_at_the_same_token(name, fleet):
    assert [texts[name]["stopped after"] for texts in fleet[0]] == [2] * WORLD


def test_the_encoder_is_as_before(fleet, alone):
    assert all(torch.equal(scores["encoder afterwards"], alone[1]) for scores in fleet[1])


@pytest.mark.parametrize(
    ("choice", "ranks", "chosen"),
    [
        ("auto", 1, Topology()),
        ("single", 4, Topology()),
        ("tensor", 2, Topology(2)),
        ("helix", 4, Topology(2, 2)),
        ("auto", 2, Topology(2)),
    ],
)
def test_the_request_names_the_topology(choice, ranks, chosen, encoder):
    assert enhancing_topology(encoder[0], ranks, EnhanceRequest("a fox", topology=choice)) == chosen


def test_topologies_that_are_not_there_are_refused(encoder):
    with pytest.raises(ValueError, match="no topology of kind helix fits this model on 1 GPUs; choose auto or single"):
        enhancing_topology(encoder[0], 1, EnhanceRequest("a fox", topology="helix"))
    with pytest.raises(ValueError, match="topology 'ring' is not known"):
        enhancing_topology(encoder[0], 4, EnhanceRequest("a fox", topology="ring"))


def test_an_encoder_that_is_streamed_is_refused(folder):
    text, tokenizer = enhance_rank.load(folder / "gemma")
    text.norm.to("meta")
    with pytest.raises(EnhanceError, match=r"lies on cpu and meta: parts of it are streamed.*Choose topology single"):
        enhance_over_ranks(text, tokenizer, REQUEST, ONE)
