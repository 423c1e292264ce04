"""A ComfyUI tree, an interpreter that can run it, and a folder with the pack and tiny models for it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parent / "comfy_scripts"


@pytest.fixture(scope="session")
def comfy_python() -> str:
    """COMFYUI_PYTHON, or this interpreter."""
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


@pytest.fixture(scope="session")
def comfy_tree() -> Path:
    path = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))
    if not (path / "execution.py").is_file():
        pytest.skip(f"no ComfyUI tree at {path} (set COMFYUI_PATH)")
    return path


@pytest.fixture(scope="session")
def comfy_environment() -> dict[str, str]:
    """The environment without this interpreter's import path, which must not leak into another one's."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}


@pytest.fixture(scope="session")
def comfy_script(comfy_python: str, comfy_environment: dict[str, str]) -> Callable[..., dict]:
    """Runs a script of comfy_scripts: the JSON object on the last line of its output. A failed script fails the test."""

    def run(name: str, *arguments: object) -> dict:
        command = [comfy_python, str(SCRIPTS / name), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=comfy_environment, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        result = json.loads(done.stdout.rstrip().rpartition("\n")[2])
        if "unusable" in result:
            pytest.skip(f"{result['unusable']} (set COMFYUI_PYTHON)")
        return result

    return run


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with tiny files under the names that the workflows give, and the tiny checkpoint of 2.0."""
    from ltx2_engine.ltx2_core.tiny import checkpoint_file, write_tiny_checkpoint, write_tiny_set
    from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
    from ltx2_engine.ltx2_core.tiny_upsampler import write_tiny_upsampler

    root = tmp_path_factory.mktemp("tiny") / "models"
    checkpoint, encoder, *_ = write_tiny_set(root, "2.3")
    write_tiny_checkpoint(root / "checkpoints" / checkpoint_file("2.0"), "2.0")
    for name in ("distilled", "dev"):
        (root / "checkpoints" / f"ltx-2.3-22b-{name}.safetensors").symlink_to(checkpoint)
    shutil.copytree(encoder, encoder.with_name("gemma-3-12b-it-qat-q4_0-unquantized"))
    write_tiny_lora(root / "loras" / "ltx-2.3-22b-distilled-lora-384.safetensors", checkpoint)
    control = root / "loras" / "ltx-2.3-22b-ic-lora-union-control.safetensors"
    write_tiny_lora(control, checkpoint, metadata={"reference_downscale_factor": "2"}, seed=1)
    write_tiny_upsampler(
        root / "latent_upscale_models" / "ltx-2.3-spatial-upscaler-x2-1.1.safetensors", "2.3-spatial-x2"
    )
    return root


@pytest.fixture(scope="session")
def example_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An input folder with the files that the workflows name: a picture, and one second of video and of sound."""
    import torch
    from ltx2_engine.ltx2_core.media import write_audio, write_video
    from PIL import Image

    folder = tmp_path_factory.mktemp("inputs")
    Image.linear_gradient("L").convert("RGB").save(folder / "example.png")
    # a rising tone: sound that is delayed or made anew does not correlate with it
    seconds = torch.arange(48000) / 48000
    sound = {
        "waveform": 0.3 * torch.sin(2 * torch.pi * (300 + 400 * seconds) * seconds)[None, None],
        "sample_rate": 48000,
    }
    ramp = torch.linspace(0, 1, 64)
    frames = torch.stack([(ramp[:, None, None] * ramp[None, :, None]).roll(2 * i, 0) for i in range(24)])
    write_video(folder / "example.mp4", frames.expand(-1, -1, -1, 3), 24.0, sound)
    write_audio(folder / "example.wav", sound)
    return folder


@pytest.fixture(scope="session")
def comfy_base(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path, example_inputs: Path) -> Path:
    """ComfyUI's base folder: the pack under its registry name, tiny models under the released names, files to load.

    The session shares it, so tests write below names of their own.
    """
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "ltx2-engine").symlink_to(ROOT, target_is_directory=True)
    (base / "models").symlink_to(tiny_models, target_is_directory=True)
    shutil.copytree(example_inputs, base / "input")
    return base


# what makes a shipped workflow small, by class; no other input changes
TINY_VALUES = {
    "LTX2EmptyLatent": {"width": 64, "height": 64, "frames": 17},
    "LTX2Sigmas": {"steps": 2},
    "ImageFromBatch": {"length": 17},
    "LTX2Retake": {"start": 0.2, "end": 0.4},
}


@pytest.fixture(scope="session")
def tiny_values() -> Callable[[str], dict[tuple[str, str], Any]]:
    """(node id, input) -> value for one workflow: a clip of 17 frames of 64 x 64 in stage 1, 2 steps where they count."""

    def values(name: str) -> dict[tuple[str, str], Any]:
        prompt = read_api(name)
        found = {
            (key, field): value
            for key, node in prompt.items()
            for field, value in TINY_VALUES.get(node["class_type"], {}).items()
        }
        for key, node in prompt.items():
            if node["class_type"] == "LTX2Guider" and node["inputs"]["video_stg"]:
                found[key, "stg_blocks"] = "1"  # the tiny model has three blocks
            if name == "extend_video" and node["class_type"] == "ImageFromBatch":
                found[key, "length"] = 9
        return found

    return values


@pytest.fixture(scope="session")
def tiny_prompt(tiny_values: Callable[[str], dict]) -> Callable[..., dict]:
    """A workflow in API format, made small; further inputs as CLASS={...} for the only node of a class."""

    def read(name: str, **changes: dict) -> dict:
        prompt = read_api(name)
        for (key, field), value in tiny_values(name).items():
            prompt[key]["inputs"][field] = value
        for class_type, inputs in changes.items():
            (node,) = [node for node in prompt.values() if node["class_type"] == class_type]
            node["inputs"].update(inputs)
        return prompt

    return read


def read_api(name: str) -> dict:
    """One shipped workflow in API format."""
    return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())
