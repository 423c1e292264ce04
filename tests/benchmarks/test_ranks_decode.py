"""bench_ranks_decode.py on a tiny VAE and the CPU: its rows, and that it has no figures for wrong results."""

import pytest


@pytest.fixture
def bench(module):
    return module("bench_ranks_decode")


def test_two_ranks_are_measured_against_one_in_one_run(bench, values):
    found = values(bench.main(["--tiny", "--sizes", "2"]))
    assert found["96x64x17, float32: 2 GPUs to one, relative difference"] <= 1e-5
    assert found["160x64x17: 2 GPUs to one, cosine, worst frame"] >= 0.9999
    for where in ("device", "host"):
        one, two = (found[f"160x64x17: {who}, to the {where}: time"] for who in ("1 GPU", "2 GPUs"))
        assert found[f"160x64x17: one GPU / 2 GPUs, to the {where}: time"] == pytest.approx(one / two)


def test_the_time_is_that_of_the_slowest_rank(bench):
    visit = bench.Visit(2, {"device": [[1.0, 5.0, 2.0], [4.0, 3.0, 6.0]]}, 0, "")
    assert visit.slowest("device") == 5.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5001, "float32: 2 GPUs to one, relative difference: 1.00e-04, allowed 2e-05"),
        (float("nan"), "2 GPUs: 96x64x17: rows are missing or not finite"),
    ],
)
def test_frames_that_are_not_those_of_one_rank_have_no_figures(bench, monkeypatch, value, message):
    def visit(size, job, clips):
        for frames in clips.frames():
            frames.fill_(0.5 if size == 1 else value)
        return bench.Visit(size, {"device": [[1.0]], "host": [[1.0]]}, 0, "")

    monkeypatch.setattr(bench, "visit", visit)
    with pytest.raises(SystemExit, match=message):
        bench.main(["--tiny", "--sizes", "2"])
