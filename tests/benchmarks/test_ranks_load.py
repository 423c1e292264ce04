"""bench_ranks_load.py on a tiny model and the CPU: its rows, and that it has no figures for other bits."""

import pytest


@pytest.fixture
def bench(module):
    return module("bench_ranks_load")


def test_a_shared_reading_is_measured_beside_whole_ones(bench, values):
    found = values(bench.main(["--tiny", "--sizes", "2", "--repeats", "1"]))
    for case in ("transformer", "transformer + LoRA"):
        assert found[f"{case}: 1 GPU, each reads all"] > 0
        alone, shared = (found[f"{case}: 2 GPUs, each reads {what}"] for what in ("all", "its share"))
        assert found[f"{case}: 2 GPUs, shared / alone"] == pytest.approx(shared / alone)


def test_the_time_is_that_of_the_slowest_rank(bench):
    ranks = [{"transformer, each reads all": {"seconds": times}} for times in ([1.0, 5.0, 2.0], [4.0, 3.0, 6.0])]
    assert bench.Visit(2, ranks).slowest("transformer", "each reads all") == 5.0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["each reads all", "each reads its share"])
def test_ranks_that_hold_other_bits_have_no_figures(bench, monkeypatch, rank, how):
    def answers(script, size, job):
        ways = [f"{case}, each reads {what}" for case in bench.CASES for what in ("all", "its share")[:size]]
        found = [{way: {"seconds": [1.0], "bits": ["alike"]} for way in ways} for _ in range(size)]
        if size == 2:
            found[rank][f"transformer + LoRA, {how}"]["bits"] = ["other"]
        return found

    monkeypatch.setattr(bench, "run_ranks", answers)
    with pytest.raises(SystemExit, match="transformer \\+ LoRA: 2 different results: no figures"):
        bench.main(["--tiny", "--sizes", "2"])
