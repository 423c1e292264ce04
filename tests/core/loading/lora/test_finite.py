import math
from pathlib import Path

import pytest
import torch
from ltx2_engine.ltx2_core.loading.checkpoint import Checkpoint, TensorInfo
from ltx2_engine.ltx2_core.loading.lora.errors import LoraError
from ltx2_engine.ltx2_core.loading.lora.finite import FiniteCheck

FILE = Checkpoint(Path("some.safetensors"), {}, {}, 0, 0)


def info(name):
    return TensorInfo(name, "F32", (2, 2), 0, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_seen(dtype, bad):
    tensor = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
    # large numbers are numbers, also where their sum is not
    check = FiniteCheck()
    for _ in range(100):
        check.note(FILE, info("large"), tensor)
    check.finish()
    tensor[3, 2] = bad
    check.note(FILE, info("bad"), tensor)
    with pytest.raises(LoraError, match="bad"):
        check.finish()


def test_the_tensor_is_named_at_the_end_and_forgotten():
    check = FiniteCheck()
    check.finish()
    check.note(FILE, info("good"), torch.ones(2, 2))
    check.note(FILE, info("bad"), torch.tensor([1.0, math.nan]))
    check.note(FILE, info("also good"), torch.ones(2, 2))
    with pytest.raises(
        LoraError, match=r"^some\.safetensors: tensor 'bad' has values that are no numbers: get the file"
    ):
        check.finish()
    check.finish()


@pytest.mark.gpu
def test_noting_does_not_wait_for_the_device():
    check = FiniteCheck()
    before = torch.cuda.get_sync_debug_mode()
    tensor = torch.tensor([1.0, math.inf], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        check.note(FILE, info("bad"), tensor)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    with pytest.raises(LoraError, match="bad"):
        check.finish()
