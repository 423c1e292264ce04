"""Gemma 3 over two and four processes against the same model in one: scores, rows and tokens."""

import math

import pytest
import torch
from safetensors.torch import load_file

from . import helix_rank
from .together import run_together

CASES, WORLD, LAYERS = helix_rank.CASES, helix_rank.WORLD, helix_rank.LAYERS

VALID = helix_rank.prompts()[0]["attention_mask"].bool()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """The results of every rank; all cases run in one start of four processes."""
    folder = tmp_path_factory.mktemp("fleet")
    folder.chmod(0o700)
    script = helix_rank.__file__
    run_together({f"rank {rank}": (script, rank, WORLD, folder) for rank in range(WORLD)})
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def dense():
    """A function from whether there is an image to the scores and the greedy tokens of the whole model."""
    from transformers import DynamicCache

    results = {}

    def compute(with_image):
        if with_image not in results:
            model = helix_rank.build(with_image)
            text = model.get_decoder().config
            new_cache = lambda: DynamicCache(config=text)  # noqa: E731
            with torch.inference_mode():
                logits = helix_rank.forced_logits(model, new_cache, with_image)
                results[with_image] = logits, helix_rank.generated(model, new_cache, with_image, do_sample=False)
        return results[with_image]

    return compute


def valid(logits):
    """Scores at tokens; at padding they mean nothing."""
    return torch.cat([logits[:, :21][VALID], logits[:, 21:].flatten(0, 1)])


@pytest.mark.parametrize("name", CASES)
def test_scores_under_teacher_forcing_equal_the_whole_models(name, fleet, dense):
    want = valid(dense(CASES[name].with_image)[0])
    assert want.abs().max() > 1
    for results in fleet:
        got = valid(results[f"{name}/logits"])
        assert (got - want).abs().max() < 1e-4
        # all ranks choose tokens from the same bits
        assert torch.equal(results[f"{name}/logits"], fleet[0][f"{name}/logits"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.with_image])
def test_scores_without_a_cache_equal_the_whole_models(name, fleet, dense):
    want = dense(False)[0][:, :21][VALID]
    for results in fleet:
        assert (results[f"{name}/logits_without_cache"][VALID] - want).abs().max() < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_generate_gives_all_ranks_the_same_tokens(name, fleet, dense):
    for kind in ("greedy", "sampled") if CASES[name].samples else ("greedy",):
        tokens = [results[f"{name}/{kind}"] for results in fleet]
        assert all(torch.equal(tokens[0], other) for other in tokens[1:])
    # no scores of this seed are nearly equal
    assert torch.equal(fleet[0][f"{name}/greedy"], dense(CASES[name].with_image)[1])


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_their_rows_of_the_feed_forward_once(name, fleet):
    case, prompt, single = CASES[name], 3 * 21, 3
    by_tokens = {"tokens": (True, True), "auto": (True, False), "weights": (False, False)}[case.split]
    counts = [
        math.ceil(rows / case.topology.size) if sliced else rows
        for rows, sliced in zip((prompt, single), by_tokens, strict=True)
    ]
    want = [counts[0]] * LAYERS + [counts[1]] * LAYERS * 5
    for results in fleet:
        assert results[f"{name}/rows"].tolist() == want


def test_a_cache_of_transformers_is_refused():
    from ltx2_engine.ltx2_core.parallel.helix_gemma import share_model
    from ltx2_engine.ltx2_core.parallel.helix_topology import ONE

    model = helix_rank.build()
    share_model(model, ONE)
    with pytest.raises(ValueError, match="needs past_key_values from new_cache"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
