"""Previews of sampling where ComfyUI shows them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.comfy
def test_previews_follow_comfyuis_setting(comfy_tree, comfy_script, tmp_path):
    seen = comfy_script("preview.py", comfy_tree, tmp_path, ROOT)
    assert seen["off"]
    assert (seen["factors"], seen["bias"]) == (128, 3)
    assert seen["other_channels"], "colours of 128 channels cannot show a latent of 16"
    assert seen["steps"] == [0, 1, 2]
    assert seen["without_picture"]
    assert (seen["kind"], seen["largest"]) == ("JPEG", 512)
    assert seen["size"] == [512, 341]
