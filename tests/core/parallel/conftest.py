"""All ranks of all sizes, started once for every test of this folder."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from .together import run_together

SIZES = (1, 2, 4)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Number of ranks -> what each of them has computed, by name. Processes of their own, on CPU, over Gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    folder.chmod(0o700)
    script = Path(__file__).with_name("rank.py")
    run_together({f"rank {rank} of {size}": (script, rank, size, folder) for size in SIZES for rank in range(size)})
    return {size: [load_file(folder / f"{size}-{rank}") for rank in range(size)] for size in SIZES}
