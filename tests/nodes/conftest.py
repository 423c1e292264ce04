"""A ComfyUI tree, an interpreter that can run it, and a folder with the pack and tiny models for it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
def comfy_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's base folder: the pack under its registry name, the tiny models also under the released names, a picture.

    The session shares it, so tests write below names of their own.
    """
    from ltx2_engine.ltx2_core.tiny import TEXT_ENCODER, checkpoint_file, write_tiny_set
    from PIL import Image

    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "ltx2-engine").symlink_to(ROOT, target_is_directory=True)
    write_tiny_set(base / "models", "2.3")
    checkpoints, encoders = base / "models" / "checkpoints", base / "models" / "text_encoders"
    (checkpoints / "ltx-2.3-22b-distilled.safetensors").symlink_to(checkpoints / checkpoint_file("2.3"))
    shutil.copytree(encoders / TEXT_ENCODER, encoders / "gemma-3-12b-it-qat-q4_0-unquantized")
    (base / "input").mkdir()
    Image.linear_gradient("L").convert("RGB").save(base / "input" / "example.png")
    return base


@pytest.fixture(scope="session")
def tiny_prompt() -> Callable[..., dict]:
    """Reads workflows/api/NAME.json, for the tiny models and a clip of 9 frames of 64 x 64; further inputs as CLASS={...}."""

    def read(name: str, **changes: dict) -> dict:
        prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())
        prompt["1"]["inputs"].update(checkpoint="ltx-2.3-tiny.safetensors", text_encoder="gemma-3-tiny")
        prompt["3"]["inputs"].update(width=64, height=64, frames=9)
        for class_type, inputs in changes.items():
            (node,) = [node for node in prompt.values() if node["class_type"] == class_type]
            node["inputs"].update(inputs)
        return prompt

    return read
