"""bench_ranks.py on a tiny model and the CPU: its rows, and that it has no figures for wrong results."""

import pytest


@pytest.fixture
def bench(module):
    return module("bench_ranks")


def test_two_ranks_are_measured_against_one_in_one_run(bench, values):
    found = values(bench.main(["--tiny", "--sizes", "2"]))
    guided = {case: found[f"64x96x17 {case}: 2 GPUs: time"] for case in ("1x2", "2x1")}
    best = min(guided, key=guided.get)
    ratio = found[f"64x96x17, 4 passes: one GPU / 2 GPUs ({best})"]
    assert ratio == pytest.approx(found["64x96x17 1x1: 1 GPU: time"] / guided[best])
    for stream in ("video", "sound"):
        assert found[f"96x64x17: PSNR after 8 steps, {stream}, 2 GPUs"] > 60
        assert found[f"96x64x17: standard deviation after 8 steps, {stream}"] > 0.1


def answer(digest="a", times=(1.0,)):
    return {
        "steps": {"96x64x17": {"times": times, "peak": 0, "digest": digest}},
        "quality": {"cudnn": "q", "cudnn again": "q"},
    }


def test_the_time_is_that_of_the_slowest_rank(bench, monkeypatch):
    monkeypatch.setattr(bench, "run_ranks", lambda *_: [answer(times=(1.0, 5.0, 2.0)), answer(times=(4.0, 3.0, 6.0))])
    assert bench.visit(2, None).slowest("96x64x17") == 5.0


@pytest.mark.parametrize("digests", [("a", "b"), ("constant", "constant"), ("not finite", "not finite")])
def test_results_that_are_not_the_same_numbers_on_all_ranks_have_no_figures(bench, monkeypatch, digests):
    monkeypatch.setattr(bench, "run_ranks", lambda *_: [answer(digest) for digest in digests])
    with pytest.raises(SystemExit, match="no figures"):
        bench.visit(2, None)
