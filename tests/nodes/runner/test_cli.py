import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from ltx2_engine import cli
from ltx2_engine.ltx2_core.host import host

ROOT = Path(cli.__file__).parent


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture
def flow(tmp_path):
    def write(prompt):
        path = tmp_path / "flow.json"
        path.write_text(json.dumps(prompt))
        return str(path)

    return write


def picture(color=0):
    return {
        "1": node("EmptyImage", width=16, height=16, batch_size=2, color=color),
        "2": node("SaveImage", images=["1", 0], filename_prefix="a"),
    }


def events(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_saves_and_lists_its_files(flow, tmp_path, capsys):
    assert cli.main(["run", flow(picture()), "--output", str(tmp_path / "o")], nodes={}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [str(tmp_path / "o" / f"a_0000{n}_.png") for n in (1, 2)]
    assert lines[2].startswith("done in ")
    assert all(Path(line).is_file() for line in lines[:2])


def test_quiet_prints_nothing(flow, tmp_path, capsys):
    assert cli.main(["run", flow(picture()), "--output", str(tmp_path), "--quiet"], nodes={}) == 0
    assert capsys.readouterr() == ("", "")


def test_json_is_one_event_a_line_and_an_envelope(flow, tmp_path, capsys):
    class Noisy:
        RETURN_TYPES = ()
        FUNCTION = "go"
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"images": ("IMAGE", {})}}

        def go(self, images):
            print("noise")
            return {}

    prompt = picture() | {"3": node("Noisy", images=["1", 0])}
    assert cli.main(["run", flow(prompt), "--output", str(tmp_path), "--json"], nodes={"Noisy": Noisy}) == 0
    captured = capsys.readouterr()
    assert "noise" in captured.err
    *stream, envelope = events(captured.out)
    assert [event["type"] for event in stream if event.get("node") != "3"] == (
        ["queued", "executing", "executed", "executing", "progress", "progress", "output", "output", "executed"]
    )
    assert {event["schema"] for event in stream} == {"event/1"}
    assert len({event["prompt_id"] for event in stream} | {envelope["data"]["prompt_id"]}) == 1
    assert envelope["schema"] == "envelope/1"
    assert envelope["ok"] is True
    assert envelope["error"] is None
    assert envelope["data"]["elapsed_seconds"] > 0
    assert envelope["data"]["executed_node_ids"] == ["1", "2", "3"]
    assert [e["path"] for e in stream if e["type"] == "output"] == envelope["data"]["outputs"]
    assert envelope["data"]["outputs_by_node"]["2"]["images"][0]["filename"] == "a_00001_.png"


def test_set_and_metadata(flow, tmp_path):
    from PIL import Image

    arguments = ["run", flow(picture()), "--output", str(tmp_path), "--quiet", "--set", "EmptyImage.color=255"]
    assert cli.main(arguments, nodes={}) == 0
    with Image.open(tmp_path / "a_00001_.png") as saved:
        assert saved.getpixel((0, 0)) == (0, 0, 255)
        assert json.loads(saved.text["prompt"])["1"]["inputs"]["color"] == 255
    assert cli.main([*arguments, "--disable-metadata"], nodes={}) == 0
    with Image.open(tmp_path / "a_00003_.png") as saved:
        assert saved.text == {}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--set", "1.colour=3"], "invalid_option"),
        (["--set", "1.color=-1"], "prompt_outputs_failed_validation"),
        (["--extra-model-paths", "/nowhere/x.yaml"], "invalid_option"),
    ],
)
def test_invalid_options_exit_2(flow, tmp_path, capsys, arguments, code):
    assert cli.main(["run", flow(picture()), "--output", str(tmp_path), "--json", *arguments], nodes={}) == 2
    (envelope,) = events(capsys.readouterr().out)
    assert envelope["ok"] is False
    assert envelope["error"]["code"] == code


def test_an_output_folder_that_cannot_be_is_refused_before_anything_runs(flow, tmp_path, capsys):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", Path("/proc/nothing")):
        assert cli.main(["run", flow(picture()), "--output", str(output), "--json"], nodes={}) == 2
        (envelope,) = events(capsys.readouterr().out)
        assert envelope["error"]["message"].startswith(f"the output folder {output} cannot be made: ")
        assert envelope["error"]["message"].endswith("Choose another: --output")


@pytest.mark.parametrize("option", ["--nodes", "--gpus"])
def test_parts_of_a_cluster_need_its_name(flow, tmp_path, capsys, option):
    assert cli.main(["run", flow(picture()), "--output", str(tmp_path), option, "2"], nodes={}) == 2
    assert capsys.readouterr().err == (
        "ltx2: --nodes and --gpus say what to take of a Ray cluster: name it with --ray ADDRESS\n"
    )


def test_a_cluster_is_asked_for_nothing_that_can_be_refused_here(flow, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["--ray", "local", "--nodes", "2", "--output", str(tmp_path / "out")]
    assert cli.main(["run", flow(picture(color=-1)), "--models", str(tmp_path), *arguments], nodes={}) == 2
    assert "Value -1 smaller than min of 0: color" in capsys.readouterr().err
    assert cli.main(["run", flow(picture()), *arguments, "--set", "Nobody.x=1"], nodes={}) == 2
    assert "no node is called 'Nobody'" in capsys.readouterr().err
    assert cli.main(["run", flow(picture()), "--ray", "local", "--nodes", "0"], nodes={}) == 2
    assert "--nodes must be 1 or more, found 0" in capsys.readouterr().err
    assert cli.main(["run", flow(picture()), *arguments], nodes={}) == 2
    assert "pip install 'ltx2-engine[ray]'" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    assert cli.main(["run", flow(picture()), *arguments], nodes={}) == 2
    assert "choose one of them" in capsys.readouterr().err


def test_an_invalid_workflow_lists_every_problem_and_exits_2(flow, capsys):
    prompt = picture(color=-1)
    prompt["1"]["inputs"] |= {"width": 0, "height": "x"}
    assert cli.main(["run", flow(prompt)], nodes={}) == 2
    text = capsys.readouterr().err
    assert "node 1 (EmptyImage): Value 0 smaller than min of 1: width" in text
    assert "Failed to convert an input value to a INT value: height" in text
    assert "Value -1 smaller than min of 0: color" in text
    assert cli.main(["run", "/nowhere.json"], nodes={}) == 2
    assert cli.main(["run"], nodes={}) == 2
    assert cli.main(["--help"], nodes={}) == 0


class Boom:
    RETURN_TYPES = ()
    FUNCTION = "go"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"how": ("STRING", {})}}

    def go(self, how):
        if how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            with host().progress(1, "stopping") as progress:
                progress.step()
        raise RuntimeError("it broke")


def test_a_node_error_exits_1_without_a_traceback_unless_asked(flow, capsys):
    path = flow({"5": node("Boom", how="raise")})
    assert cli.main(["run", path], nodes={"Boom": Boom}) == 1
    assert capsys.readouterr().err == "ltx2: node 5 (Boom): it broke\n"
    assert cli.main(["run", path, "--verbose"], nodes={"Boom": Boom}) == 1
    assert "Traceback" in capsys.readouterr().err
    assert cli.main(["run", path, "--json"], nodes={"Boom": Boom}) == 1
    error = events(capsys.readouterr().out)[-1]["error"]
    assert error["details"] == {
        "node_id": "5",
        "node_type": "Boom",
        "exception_type": "RuntimeError",
        "exception_message": "it broke",
    }


def test_the_first_interrupt_stops_cleanly_and_handlers_are_restored(flow, capsys):
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["run", flow({"5": node("Boom", how="interrupt")}), "--quiet"], nodes={"Boom": Boom}) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_messages_of_threads_stand_on_lines_of_their_own_beside_a_bar(flow, capsys):
    class Talks(Boom):
        def go(self, how):
            with host().progress(3, "sampling") as progress:
                progress.step()
                thread = threading.Thread(target=logging.getLogger("ltx2.loading").info, args=("read it",))
                thread.start()
                thread.join()
                progress.step(2)
            return {}

    assert cli.main(["run", flow({"5": node("Talks", how="")})], nodes={"Talks": Talks}) == 0
    shown = capsys.readouterr().err
    assert "sampling" in shown
    assert [line for line in re.split("[\r\n]", shown) if "read it" in line] == ["INFO read it"]


def test_models_come_from_the_option_or_the_environment(flow, tmp_path, monkeypatch):
    seen = []

    class Look(Boom):
        def go(self, how):
            seen.append(host().list_models("loras"))
            return {}

    for root, name in (("a", "one"), ("b", "two")):
        (tmp_path / root / "loras").mkdir(parents=True)
        (tmp_path / root / "loras" / f"{name}.safetensors").touch()
    path = flow({"5": node("Look", how="")})
    monkeypatch.setenv("LTX2_MODELS", str(tmp_path / "a"))
    assert cli.main(["run", path], nodes={"Look": Look}) == 0
    assert cli.main(["run", path, "--models", str(tmp_path / "b")], nodes={"Look": Look}) == 0
    assert seen == [["one.safetensors"], ["two.safetensors"]]


def test_tiny_passes_folder_and_version(tmp_path, monkeypatch, capsys):
    calls = []

    def write_tiny_set(root, label, layout):
        calls.append((root, label, layout))
        if label == "9":
            raise ValueError("version 9 is not known")
        return [root / "checkpoints" / "tiny.safetensors"]

    fake = types.SimpleNamespace(write_tiny_set=write_tiny_set)
    monkeypatch.setitem(sys.modules, "ltx2_engine.ltx2_core.tiny", fake)
    assert cli.main(["tiny", "--models", str(tmp_path), "--version", "2.0"]) == 0
    assert calls == [(tmp_path, "2.0", None)]
    assert "tiny.safetensors" in capsys.readouterr().out
    assert cli.main(["tiny", "--models", str(tmp_path), "--layout", "split"]) == 0
    assert calls[1] == (tmp_path, "2.3", "split")
    assert cli.main(["tiny", "--models", str(tmp_path), "--layout", "other"]) == 2
    assert "other" in capsys.readouterr().err
    assert cli.main(["tiny", "--models", str(tmp_path), "--version", "9"]) == 2
    assert "version 9 is not known" in capsys.readouterr().err


def test_by_path_it_makes_the_package_and_leaves_the_import_path_clean(tmp_path):
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1]); script = sys.argv[1] + '/cli.py'; "
        "sys.argv = ['ltx2', 'run', '/nowhere.json']\n"
        "try: runpy.run_path(script, run_name='__main__')\n"
        "except SystemExit as stop: code = stop.code\n"
        "import importlib.util as u; print(code, u.find_spec('kernels'), 'torch' in sys.modules, 'ltx2_engine.cli' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, str(ROOT)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split()[0] == "2", done.stderr
    assert done.stdout.split()[1:] == ["None", "False", "True"]
