"""A seed with the noise layout `comfy` starts from the noise that ComfyUI starts from."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.comfy
def test_noise_is_comfyuis(comfy_tree, comfy_script, tmp_path):
    seen = comfy_script("noise_layout.py", comfy_tree, tmp_path, ROOT)
    assert seen == {"video": True, "audio": True, "plain": True}
