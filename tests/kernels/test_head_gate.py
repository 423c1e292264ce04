"""The gate of attention heads against its definition."""

import pytest
import torch
from ltx2_engine.kernels import head_gate

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 3), (2, 5)])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gate(agree, randn, dtype, batch, tokens, fast, quantize):
    out, logits = randn(batch, tokens, 64, dtype=dtype), randn(batch, tokens, 4, dtype=dtype) * 3
    agree(head_gate, out, logits, fast=fast, quantize=quantize)


def test_many_tokens_and_strides(agree, randn):
    fused = randn(1, 63, 72)
    agree(head_gate, fused[..., 4:68], fused[..., :4])


def test_special_numbers(agree, randn):
    out, logits = randn(1, 4, 64), randn(1, 4, 4)
    out[0, 0, 1], out[0, 1] = float("nan"), 0
    logits[0, 2] = torch.tensor([float("inf"), float("-inf"), float("nan"), 90.0])
    agree(head_gate, out, logits, quantize=True)


def test_operator_and_compilation(randn, device, traced):
    from ltx2_engine.kernels.head_gate_triton import launch

    out, logits = randn(2, 3, 64), randn(2, 3, 4)
    torch.library.opcheck(launch.registered, (out, logits, False, False))
    want = head_gate(out, logits)
    got, operators = traced(head_gate, out, logits)
    assert operators == {"ltx2_engine.head_gate.default"}
    assert head_gate.contract.difference(want, got) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("width", [2048, 4096])
def test_full_size(agree, width, quantize):
    out = torch.randn(1, 15360, width, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(1, 15360, 32, device="cuda", dtype=torch.bfloat16)
    agree(head_gate, out, logits, quantize=quantize)
