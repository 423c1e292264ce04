"""bench_enhance.py with a tiny Gemma on the CPU: its rows, its table, and that it has no figures for wrong scores."""

import pytest
import torch


@pytest.fixture
def bench(module):
    return module("bench_enhance")


def test_one_and_two_ranks_are_measured_and_checked(bench, values, capsys):
    found = values(bench.main(["--tiny", "--ranks", "1", "2"]))
    names = ("one GPU", "one GPU, transformers' attention", "TP2", "Helix 1x2")
    for name in names:
        for length in (48, 80):
            assert found[f"{name} at {length} positions: speed"] > 0
            assert found[f"{name} at {length} positions: read a token, counted"] > 0
    assert all(found[f"{name}: scores, cosine to transformers"] > 0.9999 for name in ("one GPU", "TP2", "Helix 1x2"))
    printed = capsys.readouterr().out
    assert "| topology | positions | weights read | keys read | sent | tokens a second |" in printed
    assert [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| ")][1:] == [
        "| one GPU",
        "| TP2",
        "| Helix 1x2",
    ] * 2


def test_wrong_scores_have_no_figures(module):
    rank = module("ranks_enhance")
    with torch.inference_mode():
        alone = rank.Rank(0, 1, torch.device("cpu"))
        found = rank.Bench(rank.Plan(2, (8,), 1, tiny=True), alone)
        found.want = -found.want
        with pytest.raises(SystemExit, match="one GPU: scores differ from transformers' own"):
            found.shared(rank.ONE)
    assert found.rows == []
