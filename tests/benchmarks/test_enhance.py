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


def test_wrong_scores_have_no_figures(module, monkeypatch):
    rank = module("enhance_worker")
    with torch.inference_mode():
        found = rank.Bench(rank.Plan(2, (8,), 1, tiny=True), torch.device("cpu"), list)
        found.want = -found.want
        with pytest.raises(SystemExit, match="one GPU: scores differ from transformers' own"):
            found.shared(rank.ONE)
    assert found.rows == []


def test_a_rank_that_fails_is_told_with_its_log(bench, monkeypatch, tmp_path):
    entry = tmp_path / "rank.py"
    entry.write_text("import sys, time; time.sleep(60) if sys.argv[1] == '0' else sys.exit('no memory left')")
    monkeypatch.setattr(bench, "ENTRY", entry)
    plan = bench.Plan(2, (8,), 1, tiny=True)
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed:\nno memory left"):
        bench.run_ranks(2, plan, 60)
    with pytest.raises(RuntimeError, match="rank 0 of 1 failed"):
        bench.run_ranks(1, plan, 0.2)
