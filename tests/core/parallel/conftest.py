"""All ranks of all sizes, started once for every test of this folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SIZES = (1, 2, 4)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Number of ranks -> what each of them has computed, by name. Processes of their own, on CPU, over Gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    folder.chmod(0o700)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("rank.py")
    processes = {
        (size, rank): subprocess.Popen(
            [sys.executable, script, str(rank), str(size), folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for size in SIZES
        for rank in range(size)
    }
    try:
        for (size, rank), process in processes.items():
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, f"rank {rank} of {size}:\n{output.decode()[-4000:]}"
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return {size: [load_file(folder / f"{size}-{rank}") for rank in range(size)] for size in SIZES}
