"""transformers without a torchaudio that cannot be loaded, and a tiny text encoder."""

import sys

import pytest
import torch

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):
    # an installed but unloadable torchaudio (beside a CPU build of torch) breaks importing Gemma from transformers
    sys.modules["torchaudio"] = None


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
