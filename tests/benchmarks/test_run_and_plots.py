"""The driver, and the plots from a sample of results."""

import json

import pytest

ROWS = {
    "step_2.3": {
        "512x768x121: ours exact: time": 360.0,
        "512x768x121: ours exact: time, visit 1": 350.0,
        "768x1280x121: ours exact: time": 1040.0,
        "512x768x121: diffusers eager: time": 470.0,
        "768x1280x121: diffusers eager: time": 1344.0,
        "768x1280x121: diffusers eager / ours exact": 1.29,
    },
    "step_2.3_guided": {"768x1280x121: ours exact, guided, one forward: time": 1040.0},
    "kernels": {
        "copy": 4100.0,
        "head_gate: 15360x4096: twin": 70.0,
        "head_gate: 15360x4096: share of copy bandwidth": 0.9,
    },
    "load_2.3": {"transformer: time": 1.4},
}


@pytest.fixture
def results(tmp_path):
    for name, rows in ROWS.items():
        listed = [{"id": what, "value": value, "unit": "", "bar": ""} for what, value in rows.items()]
        result = {"hardware": "a GPU", "versions": {"torch": "2"}, "command": "", "rows": listed}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return tmp_path


def test_curves_and_shares_are_read_from_rows(module, results):
    plots = module("plots")
    curves = plots.step_curves(json.loads((results / "step_2.3.json").read_text()))
    assert curves == {
        "ours exact": [(6144, 360.0), (15360, 1040.0)],
        "diffusers eager": [(6144, 470.0), (15360, 1344.0)],
    }
    shares = plots.shares(json.loads((results / "kernels.json").read_text()))
    assert shares == {"head_gate: 15360x4096": 0.9}


def test_pictures_are_made_of_what_can_be_drawn(module, results):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    written = module("plots").plots(results)
    assert [path.name for path in written] == ["kernels.png", "step_2.3.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_without_matplotlib_nothing_is_drawn(module, results, monkeypatch, capsys):
    monkeypatch.setitem(module("sys").modules, "matplotlib", None)
    module("plots").main(["--results", str(results)])
    assert capsys.readouterr().out == "matplotlib is not installed: no plots\n"
    assert not list(results.glob("*.png"))


def test_every_benchmark_is_there_and_trials_have_an_option(module, tmp_path, monkeypatch, capsys):
    run = module("run")
    for name, (script, *_) in run.BENCHMARKS.items():
        monkeypatch.setattr("sys.argv", [script, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            module(script.removesuffix(".py")).main()
        options = capsys.readouterr().out
        assert "--out " in options
        if script in run.TRIALS:
            assert f"{run.TRIALS[script]} " in options
        call = run.command(name, tmp_path, tiny=script in run.TRIALS, others=["--name", "x"])
        assert call[1].endswith(script)
        assert call[-4:] == ["--out", str(tmp_path), "--name", "x"]


def test_a_failed_benchmark_does_not_stop_the_others(module, tmp_path, monkeypatch, capfd):
    run = module("run")
    for name in ("good", "bad"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit({'1' if name == 'bad' else ''})")
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "BENCHMARKS", {"bad": ("bad.py",), "good": ("good.py",)})
    with pytest.raises(SystemExit, match="failed: bad"):
        run.main(["bad", "good", "--out", str(tmp_path)])
    assert "== good: 0 s, done" in capfd.readouterr().out


def test_the_command_of_a_result_does_not_tell_where_files_are(module):
    words = ["python", "bench.py", "--folder", "/a", "--repeat", "3", "--out=/b", "--text-folder", "/c", "--tiny"]
    assert module("report").without_places(words) == ["python", "bench.py", "--repeat", "3", "--tiny"]
