"""Exchange by copy engines against NCCL's, on as many GPUs as there are: two ranks share the only one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ltx2_engine.ltx2_core.parallel.worker_environment import worker_environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
SCRIPT = Path(__file__).with_name("peer_rank.py")
SIZE = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found to be the same."""
    folder = tmp_path_factory.mktemp("peers")
    # NCCL takes ranks of one GPU for ranks of several hosts, which is how it lets them be
    one_gpu = torch.cuda.device_count() < SIZE
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder],
            env=worker_environment(os.environ, {"NCCL_HOSTID": f"{rank}"} if one_gpu else {}, rank, SIZE, folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(SIZE)
    ]
    try:
        for rank, process in enumerate(running):
            output, _ = process.communicate(timeout=150)
            assert process.returncode == 0, f"rank {rank}:\n{output.decode()[-4000:]}"
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(SIZE)]


def test_both_ways_bring_the_same_bits(found):
    for rank, same in enumerate(found):
        wrong = [name for name, value in same.items() if value is False]
        assert not wrong, f"rank {rank}: {wrong}"


def test_closing_gives_the_memory_back(found):
    for rank in found:
        memory = rank["memory"]
        assert memory["taken"] >= memory["expected"]
        assert memory["missing"] < 64 << 20
