"""The shipped workflows through ComfyUI's executor and through the pack's runner, with the same interpreter: same bits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
IMAGES, AUDIO = "8:0", "8:1"
SAMPLER = "7"

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def run_in_comfyui(comfy_tree: Path, comfy_base: Path, comfy_script: Callable[..., dict]) -> Callable[..., dict]:
    def run(prompt_file: Path, *options: object) -> dict:
        pack = comfy_base / "custom_nodes" / "ltx2-engine"
        places = ["--comfy", comfy_tree, "--base", comfy_base, "--pack", pack, "--prompt", prompt_file]
        result = comfy_script("run_prompt.py", *places, *options)
        assert result["loaded"] == [True]
        assert result["valid"], result["node_errors"]
        return result

    return run


@pytest.fixture(scope="module", params=["text_to_video", "image_to_video", "guided"])
def both(
    request: pytest.FixtureRequest,
    run_in_comfyui: Callable[..., dict],
    comfy_base: Path,
    comfy_script: Callable[..., dict],
    tiny_prompt: Callable[..., dict],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict, dict, Path]:
    """What ComfyUI answered, what the runner answered, and the folder with the tensors of both."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "guided":
        numbers = {"preset": "guided 2.3/2.5", "video_cfg": 3.0, "video_stg": 1.0, "video_modality": 3.0}
        schedule = {"schedule": "ltx-2", "steps": 4}
        prompt = tiny_prompt("text_to_video", LTX2Guider={**numbers, "stg_blocks": "1"}, LTX2Sigmas=schedule)
    else:
        prompt = tiny_prompt(request.param)
    (folder / "prompt.json").write_text(json.dumps(prompt))
    kept = ["--capture", IMAGES, AUDIO, "--save"]
    comfyui = run_in_comfyui(folder / "prompt.json", *kept, folder / "comfyui.safetensors")
    places = ["--pack", ROOT, "--base", comfy_base, "--prompt", folder / "prompt.json"]
    headless = comfy_script("run_headless.py", *places, *kept, folder / "headless.safetensors")
    return comfyui, headless, folder


def test_images_and_sound_are_bit_equal(both: tuple[dict, dict, Path]):
    from safetensors.torch import load_file

    comfyui, headless, folder = both
    assert comfyui["success"], comfyui["traceback"]
    assert headless["comfy"] is False
    want, got = (load_file(folder / f"{name}.safetensors") for name in ("comfyui", "headless"))
    assert sorted(want) == sorted(got) == [IMAGES, f"{AUDIO}.waveform"]
    assert want[IMAGES].shape == (9, 64, 64, 3)
    assert want[f"{AUDIO}.waveform"].shape == (1, 2, 480 * (4 * 9 - 3))
    for name, tensor in want.items():
        assert tensor.std() > 1e-3, f"{name} is constant, so equality would prove nothing"
        assert torch.equal(tensor, got[name]), name


def test_progress_of_sampling_reaches_its_end(both: tuple[dict, dict, Path]):
    comfyui, _, _ = both
    bar = [(event["value"], event["max"]) for event in comfyui["progress"] if event["node"] == SAMPLER]
    assert bar[-1][0] == bar[-1][1] == (4 if both[2].name.startswith("guided") else 8)


def test_both_save_the_video(both: tuple[dict, dict, Path], comfy_base: Path):
    comfyui, headless, _ = both
    (saved,) = comfyui["outputs"]["10"]["images"]
    files = [comfy_base / "output" / saved["subfolder"] / saved["filename"], *map(Path, headless["files"])]
    assert len(files) == 2
    assert all(path.stat().st_size > 1000 for path in files)


def test_interrupt_stops_between_two_steps(
    run_in_comfyui: Callable[..., dict], tiny_prompt: Callable[..., dict], tmp_path
):
    prompt = tiny_prompt("text_to_video", LTX2Sigmas={"schedule": "ltx-2", "steps": 1000})
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    # sampling loads the transformer first, which draws on the same bar
    result = run_in_comfyui(tmp_path / "prompt.json", "--interrupt-node", SAMPLER, "--interrupt-after", 6)
    assert (result["success"], result["status"]) == (False, "execution_interrupted")
    assert result["message"]["node_id"] == SAMPLER
    steps = [event["value"] for event in result["progress"] if event["max"] == 1000]
    assert 0 < steps[-1] < 1000
    assert result["outputs"] == {}
