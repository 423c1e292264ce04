"""The pack inside a real ComfyUI, on CPU.

ComfyUI must come first on the import path and leaves much behind in its process, so every scenario is a subprocess that
prints one JSON line. COMFYUI_PATH names the ComfyUI tree (default: comfy-cli's, ~/comfy/ComfyUI); COMFYUI_PYTHON names
an interpreter with ComfyUI's requirements when this one lacks them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ltx2_engine.ltx2_core import host as core_host
from ltx2_engine.nodes.host import NestedLatent, install, nested_latent, split_nested

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parent / "comfy_scripts"
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
MIB = 2**20


def run_script(name: str, *arguments: object) -> dict:
    """The JSON object on the last line of a script's output; a failed script fails the test with its own words."""
    command = [PYTHON, str(SCRIPTS / name), *map(str, arguments)]
    # this interpreter's import path must not leak into another one's
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    if "unusable" in result:
        pytest.skip(f"{result['unusable']} (set COMFYUI_PYTHON)")
    return result


@pytest.fixture(scope="module")
def tree() -> Path:
    path = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))
    if not (path / "execution.py").is_file():
        pytest.skip(f"no ComfyUI tree at {path} (set COMFYUI_PATH)")
    return path


def linked(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pack = folder / name
    pack.symlink_to(ROOT, target_is_directory=True)
    return pack


@pytest.fixture(scope="module")
def checks(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What host_checks.py saw, with the pack in a folder whose name has spaces."""
    base = tmp_path_factory.mktemp("checks")
    return run_script("host_checks.py", tree, linked(base / "custom_nodes", "LTX 2 Engine"), base)


PROMPT = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 16, "batch_size": 9, "color": 0x336699}},
    "2": {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 8.0}},
    "3": {
        "class_type": "SaveVideo",
        "inputs": {"video": ["2", 0], "filename_prefix": "host test", "format": "mp4", "format.codec": "h264"},
    },
    "4": {"class_type": "HostTestProgress", "inputs": {"steps": 4}},
}


def run_prompt(tree: Path, base: Path, prompt: dict, *options: object) -> dict:
    (base / "prompt.json").write_text(json.dumps(prompt))
    packs = [linked(base / "custom_nodes", "ltx2-engine"), SCRIPTS / "progress_probe.py"]
    places = ["--comfy", tree, "--base", base, "--prompt", base / "prompt.json", "--pack", *packs]
    return run_script("run_prompt.py", *places, *options)


@pytest.fixture(scope="module")
def finished(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    base = tmp_path_factory.mktemp("finished")
    return run_prompt(tree, base, PROMPT, "--capture", "1:0", "4:0", "--save", base / "kept.safetensors"), base


def test_importing_the_pack_is_cheap_and_loads_neither_torch_nor_comfyui(tmp_path: Path):
    cost = run_script("import_pack.py", linked(tmp_path, "ltx2-engine"))
    assert cost["seconds"] < 0.1
    assert "ltx2_engine" in cost["added"]
    heavy = {"torch", "numpy", "safetensors", "transformers", "PIL", "av", "comfy", "folder_paths", "nodes"}
    assert not heavy & set(cost["added"])


@pytest.mark.comfy
def test_pack_loads_from_a_folder_with_spaces(checks: dict):
    assert checks["loaded"] is True
    assert [line for line in checks["log"] if "IMPORT FAILED" in line or "Cannot import" in line] == []
    assert checks["registered"] == checks["ids"]
    assert not {"torch", "numpy", "triton"} & set(checks["added"])


@pytest.mark.comfy
def test_pack_loads_under_its_registry_name(finished: tuple[dict, Path]):
    result, _ = finished
    assert result["loaded"] == [True, True]
    assert [line for line in result["log"] if "IMPORT FAILED" in line or "Cannot import" in line] == []


@pytest.mark.comfy
def test_prompt_runs_with_progress_in_the_nodes_name(finished: tuple[dict, Path]):
    result, base = finished
    assert result["success"], result
    assert result["status"] == "execution_success"
    bar = [(event["value"], event["max"]) for event in result["progress"] if event["node"] == "4"]
    assert (bar[0], bar[-1]) == ((0, 4), (4, 4))
    assert result["outputs"]["4"]["text"] == ["comfyui", "True", "['prompt']"]
    (video,) = result["outputs"]["3"]["images"]
    assert (base / "output" / video["subfolder"] / video["filename"]).stat().st_size > 0


@pytest.mark.comfy
def test_captured_slots_are_saved_bit_for_bit(finished: tuple[dict, Path]):
    from safetensors.torch import load_file

    kept = load_file(finished[1] / "kept.safetensors")
    assert list(kept) == ["1:0"]
    colour = torch.tensor([0x33, 0x66, 0x99]) / 0xFF
    assert torch.equal(kept["1:0"], colour.expand(9, 16, 32, 3))


@pytest.mark.comfy
def test_interrupt_stops_a_running_node(tree: Path, tmp_path: Path):
    result = run_prompt(tree, tmp_path, {"4": PROMPT["4"]}, "--core", "--interrupt-after", 2)
    assert result["valid"]
    assert result["success"] is False
    assert result["status"] == "execution_interrupted"
    assert [event["value"] for event in result["progress"]] == [0, 1]


@pytest.mark.comfy
def test_install_makes_comfyui_the_default_host_once(checks: dict):
    assert checks["host"] == {"ours": True, "one": True, "name": "comfyui"}
    assert checks["devices"] == [["cpu"], "cpu", "cpu"]
    assert checks["free"] > MIB


@pytest.mark.comfy
def test_progress_reaches_its_total(checks: dict):
    assert checks["progress"]["events"] == [["7", 0, 4], ["7", 5, 5]]


@pytest.mark.comfy
def test_interrupt_is_raised_by_the_step_that_sees_it_and_once(checks: dict):
    seen = checks["interrupt"]
    assert seen == {
        "raised": "InterruptProcessingException",
        "is_exception": False,
        "steps": 2,
        "seen": True,
        "after": False,
    }


@pytest.mark.comfy
def test_unload_all_releases_an_admitted_resident(checks: dict):
    seen = checks["unload_all"]
    assert seen["before"] == seen["again"] == ["LTX-2 transformer"]
    assert seen["sizes"] == {"model": 10 * MIB, "loaded": 10 * MIB, "dynamic": False}
    assert seen["kept"] == [], "loading again must keep the weights"
    assert seen["released"] == [["cpu", None]]
    assert (seen["held"], seen["after"]) == (0, [])


@pytest.mark.comfy
def test_free_memory_takes_a_part_then_everything(checks: dict):
    part, rest = checks["free_some"]["part"], checks["free_some"]["rest"]
    assert part == {"released": [["cpu", 3 * MIB]], "held": 7 * MIB, "listed": ["LTX-2 text encoder"]}
    assert rest == {"released": [["cpu", None]], "held": 0, "listed": []}


@pytest.mark.comfy
def test_admit_makes_room_or_says_what_is_missing(checks: dict):
    seen = checks["admit_evicts"]
    assert seen["evicted"] == [["cpu", 6 * MIB]], "20 MiB less the first's 10 leave 10 of the 16 that are needed"
    assert seen["message"].startswith("HostOutOfMemory: third does not fit on cpu")
    assert "0.06 GiB for weights" in seen["message"]
    assert "2.00 GiB for work" in seen["message"]
    assert "third" not in seen["listed"]


@pytest.mark.comfy
def test_retire_leaves_nothing_behind(checks: dict):
    seen = checks["retire"]
    assert seen == {"before": ["LTX-2 decoder"], "after": [], "released": [["cpu", None]], "leaks": []}


@pytest.mark.comfy
def test_model_names_resolve_inside_comfyuis_folders(checks: dict):
    seen = checks["paths"]
    assert seen["loras"] == ["link.safetensors", "sub/a.safetensors"]
    assert seen["text_encoders"] == ["gemma/q4.gguf", "gemma/tiny", "old.GGUF", "single.safetensors"]
    assert [name.partition("/")[2] for name in seen["encoders"]] == seen["text_encoders"]
    assert seen["ggufs"] == {
        "checkpoints": ["c.gguf", "shared.safetensors"],
        "diffusion_models": ["quantised/t.gguf"],
        "text_encoders": ["gemma/q4.gguf", "gemma/tiny/model.safetensors", "old.GGUF", "single.safetensors"],
    }
    assert seen["resolved"] == seen["shared"].replace("checkpoints/shared", "loras/sub/a")
    assert seen["encoder"] == "text_encoders/gemma/tiny"
    assert (seen["input"], seen["marked"], seen["temp"]) == ("input/photo.png", "output/made.png", "temp")
    first = {"filename": "take_00001_.mp4", "subfolder": "clips", "type": "output"}
    assert seen["saved"] == [first, "take_00002_.mp4"]


@pytest.mark.comfy
def test_path_tricks_are_refused(checks: dict):
    answers = dict(checks["paths"]["refused"])
    assert answers.pop("kind") == "ValueError"
    assert len(answers) == 23
    assert {name: said for name, said in answers.items() if said != "PathError"} == {}


@pytest.mark.comfy
def test_av_latents_are_comfyuis_nested_tensors(checks: dict):
    assert checks["nested"] == {"theirs": True, "same": True}


def test_install_without_comfyui_changes_nothing():
    before = core_host.host()
    install()
    assert core_host.host() is before
    assert "comfy" not in sys.modules


def test_nested_latent_without_comfyui():
    video, audio = torch.zeros(1, 2, 3, 4, 5), torch.ones(1, 2, 3, 4)
    samples = nested_latent(video, audio)
    assert isinstance(samples, NestedLatent)
    assert (samples.is_nested, samples.shape, samples.dtype, samples.device) == (
        True,
        video.shape,
        video.dtype,
        video.device,
    )
    halves = split_nested(samples.to(torch.float16))
    assert [(half.dtype, half.shape) for half in halves] == [(torch.float16, video.shape), (torch.float16, audio.shape)]
    assert split_nested(video) == (video, None)
    with pytest.raises(ValueError, match="of 3 tensors"):
        split_nested(NestedLatent((video, audio, audio)))
