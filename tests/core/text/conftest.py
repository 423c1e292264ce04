"""A tiny text encoder."""

import pytest
import torch


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory):
    """A folder as ``write_tiny_gemma`` writes it, with 7 hidden states of width 64."""
    from ltx2_engine.ltx2_core.text.tiny_gemma import write_tiny_gemma

    folder = tmp_path_factory.mktemp("gemma")
    write_tiny_gemma(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield
