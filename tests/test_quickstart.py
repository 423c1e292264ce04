"""quickstart.py without installing anything: what it runs, what it skips, and what it says when something fails."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """The script as a module whose environment lies in a temporary folder."""
    spec = importlib.util.spec_from_file_location("ltx2_quickstart", ROOT / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    module.VENV.mkdir()
    return module


@pytest.fixture
def calls(quickstart, monkeypatch):
    """The commands that would run."""
    made = []

    def record(*command, **options):
        made.append([str(part) for part in command])
        return "/somewhere/quickstart_00001_.mp4\ndone in 1.0 s\n" if options.get("capture") else ""

    monkeypatch.setattr(quickstart, "call", record)
    return made


def test_it_starts_with_the_standard_library_only():
    done = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "quickstart.py", "tset"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "usage: python3 quickstart.py [test]" in done.stderr


def test_an_old_python_is_refused_with_a_remedy(quickstart, monkeypatch, capsys):
    monkeypatch.setattr(quickstart.sys, "version_info", (3, 9, 18))
    assert quickstart.main([]) == 2
    assert "Python 3.10 or newer is needed, this is 3.9; try python3.11" in capsys.readouterr().err


def test_installing_happens_once_per_content_of_the_pins(quickstart, calls, monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    pins = tmp_path / "requirements" / "demo.txt"
    pins.parent.mkdir()
    pins.write_text("torch==2.13.0\n")
    quickstart.install("demo")
    quickstart.install("demo")
    assert len(calls) == 1
    pins.write_text("torch==2.13.1\n")
    quickstart.install("demo")
    assert len(calls) == 2
    assert all(call[1:4] == ["-m", "pip", "install"] and call[-2:] == ["-r", str(pins)] for call in calls)


def test_a_failed_install_is_tried_again_and_says_what_to_do(quickstart, monkeypatch, capsys):
    def fail(*command, **options):
        raise quickstart.Stop(1)

    monkeypatch.setattr(quickstart, "call", fail)
    assert quickstart.main([]) == 1
    assert "HTTPS_PROXY" in capsys.readouterr().err
    assert not (quickstart.VENV / "installed-demo").exists()


def test_a_python_without_venv_says_what_to_install(quickstart, monkeypatch, capsys, tmp_path):
    def fail(*command, **options):
        raise quickstart.Stop(1)

    monkeypatch.setattr(quickstart, "call", fail)
    monkeypatch.setattr(quickstart, "PYTHON", tmp_path / "missing" / "python")
    assert quickstart.main([]) == 1
    assert f"apt install python3.{sys.version_info[1]}-venv" in capsys.readouterr().err


def test_pins_are_exact_and_without_torchaudio(quickstart):
    for name in quickstart.SETS:
        lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        wanted = [line for line in lines if line and not line.startswith("#")]
        assert wanted
        assert all("==" in line.partition(";")[0] for line in wanted), name
        assert not [line for line in wanted if line.startswith(("torchaudio", "torchvision", "--"))]
    assert quickstart.SETS["reference"] == ("--no-deps",), "ltx-core asks for torchaudio"


def test_demo_sets_inputs_that_the_workflow_has(quickstart):
    flow = json.loads((ROOT / "workflows" / "api" / "text_to_video.json").read_text(encoding="utf-8"))
    inputs = {f"{node['class_type']}.{name}": value for node in flow.values() for name, value in node["inputs"].items()}
    for name, value in quickstart.DEMO.items():
        assert type(inputs[name]) is type(value), name


def test_demo_runs_the_workflow_and_prints_both_files(quickstart, calls, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(quickstart, "MODELS", tmp_path / "models")
    assert quickstart.main([]) == 0
    tools = [Path(call[1]).name if call[1] != "-I" else call[3] for call in calls if call[1] != "-m"]
    assert tools == ["cli.py", "cli.py", "sheet"]
    assert [call[2] for call in calls if call[1].endswith("cli.py")] == ["tiny", "run"]
    printed = capsys.readouterr().out.splitlines()
    assert "/somewhere/quickstart_00001_.mp4" in printed
    assert "/somewhere/quickstart_00001_.png" in printed


def test_tests_run_the_checks_in_order(quickstart, calls):
    assert quickstart.main(["test"]) == 0
    tools = [call[2] for call in calls if call[1] == "-m" and call[2] != "pip"]
    assert tools == ["ruff", "ruff", "mypy", "pytest"]


def test_exit_codes_of_commands_are_passed_on(quickstart):
    assert quickstart.call(sys.executable, "-c", "print(7)", capture=True) == "7\n"
    with pytest.raises(quickstart.Stop) as stop:
        quickstart.call(sys.executable, "-c", "raise SystemExit(5)")
    assert stop.value.code == 5


@pytest.mark.skipif(sys.platform == "win32", reason="processes do not end by signals there")
def test_a_command_that_a_signal_ended_gives_the_shells_code(quickstart):
    with pytest.raises(quickstart.Stop) as stop:
        quickstart.call(sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signal.SIGTERM)})")
    assert stop.value.code == 128 + signal.SIGTERM


def test_interrupting_ends_with_130(quickstart, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "check_python", interrupt)
    assert quickstart.main([]) == 130
    assert "interrupted; run it again" in capsys.readouterr().err


def test_contact_sheet_lies_beside_the_video(quickstart, tmp_path):
    torch = pytest.importorskip("torch")
    from ltx2_engine.ltx2_core.media import read_image, write_video

    video = tmp_path / "clip.mp4"
    write_video(video, torch.full((9, 64, 96, 3), 0.5), 24.0)
    done = subprocess.run(
        [sys.executable, "-I", ROOT / "quickstart.py", "sheet", video], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    sheet = read_image(tmp_path / "clip.png")
    assert sheet.shape == (3 * 64, 4 * 96, 3)
    assert (sheet[:64] - 0.5).abs().max() < 0.05
