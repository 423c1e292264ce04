"""Exchange by copy engines against NCCL's, on as many GPUs as there are: two ranks share the only one."""

import json
from pathlib import Path

import pytest
import torch

from .together import run_together

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
    run_together({f"rank {rank}": [SCRIPT, rank, SIZE, folder] for rank in range(SIZE)})
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
