"""The shipped workflows through ComfyUI's executor and through the pack's runner, with the same interpreter: same bits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("text_to_video", "guided_two_stage", "hq_two_stage", "ic_lora", "audio_to_video", "extend_video")
SAMPLER = "7"  # in the workflow that is interrupted
FRAMES, FPS = 17, 24

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


@pytest.fixture(scope="module", params=NAMES)
def both(
    request: pytest.FixtureRequest,
    run_in_comfyui: Callable[..., dict],
    comfy_base: Path,
    comfy_script: Callable[..., dict],
    tiny_prompt: Callable[..., dict],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict, dict, Path]:
    """What ComfyUI answered, what the runner answered, and the folder with the prompt and the tensors of both."""
    folder = tmp_path_factory.mktemp(request.param)
    prompt = tiny_prompt(request.param)
    (folder / "prompt.json").write_text(json.dumps(prompt))
    kept = ["--capture", *decoded(prompt), "--save"]
    comfyui = run_in_comfyui(folder / "prompt.json", *kept, folder / "comfyui.safetensors")
    places = ["--pack", ROOT, "--base", comfy_base, "--prompt", folder / "prompt.json"]
    headless = comfy_script("run_headless.py", *places, *kept, folder / "headless.safetensors")
    return comfyui, headless, folder


def decoded(prompt: dict) -> tuple[str, str]:
    """The slots of the decoded pictures and sound."""
    (node,) = [key for key, node in prompt.items() if node["class_type"] == "LTX2Decode"]
    return f"{node}:0", f"{node}:1"


def test_images_and_sound_are_bit_equal(both: tuple[dict, dict, Path]):
    from safetensors.torch import load_file

    comfyui, headless, folder = both
    assert comfyui["success"], comfyui["traceback"]
    assert headless["comfy"] is False
    prompt = json.loads((folder / "prompt.json").read_text())
    images, audio = decoded(prompt)
    want, got = (load_file(folder / f"{name}.safetensors") for name in ("comfyui", "headless"))
    assert sorted(want) == sorted(got) == sorted([images, f"{audio}.waveform"])
    side = 64 * sum(node["class_type"] == "LTX2Sampler" for node in prompt.values())
    assert want[images].shape == (FRAMES, side, side, 3)
    assert want[f"{audio}.waveform"].shape == (1, 2, 480 * (4 * round(25 * FRAMES / FPS) - 3))
    for name, tensor in want.items():
        assert tensor.std() > 1e-3, f"{name} is constant, so equality would prove nothing"
        assert torch.equal(tensor, got[name]), name


def test_progress_of_sampling_reaches_its_end(both: tuple[dict, dict, Path]):
    comfyui, _, folder = both
    prompt = json.loads((folder / "prompt.json").read_text())
    for key in (key for key, node in prompt.items() if node["class_type"] == "LTX2Sampler"):
        bar = [(event["value"], event["max"]) for event in comfyui["progress"] if event["node"] == key]
        assert bar[-1][0] == bar[-1][1] >= 2


def test_both_save_the_video(both: tuple[dict, dict, Path], comfy_base: Path):
    comfyui, headless, _ = both
    ((saved,),) = [output["images"] for output in comfyui["outputs"].values() if "images" in output]
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


def test_an_upsampler_that_does_not_fit_is_refused_before_sampling(
    run_in_comfyui: Callable[..., dict], comfy_base: Path, tiny_prompt: Callable[..., dict], tmp_path: Path
):
    """The latent is a lazy input, so ComfyUI asks the node before it samples."""
    from ltx2_engine.ltx2_core.tiny_upsampler import write_tiny_upsampler

    write_tiny_upsampler(comfy_base / "models" / "latent_upscale_models" / "old.safetensors", "2.0-spatial-x2")
    prompt = tiny_prompt("distilled_two_stage", LTX2UpscaleLatent={"upsampler": "old.safetensors"})
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    result = run_in_comfyui(tmp_path / "prompt.json")
    assert not result["success"]
    assert result["message"]["node_type"] == "LTX2UpscaleLatent"
    assert "this upsampler is for LTX-2.0" in result["message"]["exception_message"]
    samplers = {key for key, node in prompt.items() if node["class_type"] == "LTX2Sampler"}
    assert not [event for event in result["progress"] if event["node"] in samplers]
