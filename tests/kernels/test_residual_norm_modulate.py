"""The residual, norm and modulation chain against its definition."""

import pytest
import torch
from ltx2_engine.kernels import Rows, residual_norm_modulate

EPS = 1e-6
HALF = [torch.bfloat16, torch.float16]


def rows(randn, kind, batch, tokens, width, dtype=torch.bfloat16):
    """A pair of scale and shift of that kind; views of one tensor, as the transformer has them."""
    vectors = {"one": 1, "token": tokens, "indexed": 3, "shared": 3}[kind]
    made = randn(1 if kind == "shared" else batch, vectors, 2, width, dtype=dtype)
    index = torch.arange(batch * tokens, device=made.device).view(batch, tokens) % 3
    if kind == "shared":
        index = index.int()
    index = index if kind in ("indexed", "shared") else None
    return Rows(made[:, :, 0], index), Rows(made[:, :, 1], index)


@pytest.mark.parametrize("kind", ["one", "token", "indexed", "shared"])
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 3, 64), (2, 5, 100)])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_norm_and_modulation(agree, randn, kind, batch, tokens, width, dtype):
    x = randn(batch, tokens, width, dtype=dtype)
    same, _ = agree(residual_norm_modulate, x, (rows(randn, kind, batch, tokens, width, dtype),), EPS)
    assert same is x


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize("outputs", ["", "n", "m", "nm", "mm"])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("gated", [None, "one", "indexed"])
def test_residual_with_any_outputs(agree, randn, fast, outputs, kept, gated):
    x, branch = randn(2, 3, 64), randn(2, 3, 64)
    modulations = tuple(rows(randn, "indexed", 2, 3, 64) if kind == "m" else None for kind in outputs)
    agree(
        residual_norm_modulate,
        x,
        modulations,
        EPS,
        branch=branch,
        gate=None if gated is None else rows(randn, gated, 2, 3, 64)[0],
        keep=torch.tensor([1.0, 0.3], device=x.device).to(x.dtype).view(2, 1, 1) if kept else None,
        fast=fast,
    )


def test_residual_without_norm_has_equal_bits(agree, randn):
    x, branch, gate = randn(1, 63, 64), randn(1, 63, 64), Rows(randn(1, 1, 64))
    got, _ = agree(residual_norm_modulate, x, (), EPS, branch=branch, gate=gate)
    assert torch.equal(got, x + branch * gate.values)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("kind", ["one", "indexed"])
def test_modulation_without_norm_has_equal_bits(agree, randn, kind, quantize):
    x, (scale, shift) = randn(2, 5, 64), rows(randn, kind, 2, 5, 64)
    same, (output,) = agree(residual_norm_modulate, x, ((scale, shift),), None, quantize=quantize)
    assert same is x
    output = output[0] if quantize else output
    assert torch.equal(output, x * (1 + scale.spread(5)) + shift.spread(5))


def test_modulation_without_norm_of_a_sum(agree, randn):
    x, branch = randn(2, 5, 64), randn(2, 5, 64)
    for fast in (False, True):
        agree(residual_norm_modulate, x, (rows(randn, "one", 2, 5, 64), None), None, branch=branch, fast=fast)


def test_strided_inputs(agree, randn):
    wide = randn(2, 7, 3, 64)
    agree(residual_norm_modulate, wide[:, :, 1], (rows(randn, "one", 2, 7, 64),), EPS, branch=wide[:, :, 2])


def test_special_numbers(agree, randn):
    x = randn(1, 6, 64)
    x[0, 0] = 0
    x[0, 1, 5] = float("nan")
    x[0, 2, 6] = float("inf")
    x[0, 3] *= 1e18
    x[0, 4] *= 1e-20
    branch = torch.zeros_like(x)
    branch[0, 5, 1] = float("-inf")
    _, (out,) = agree(residual_norm_modulate, x, (rows(randn, "one", 1, 6, 64),), EPS, branch=branch)
    assert out[0, 1].isnan().all()
    assert out[0, 3].isfinite().all()


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
def test_quantized_outputs(agree, randn, fast):
    x = randn(2, 4, 64)
    x[0, 0] = 0
    x[0, 1, 2] = float("nan")
    modulations = (rows(randn, "one", 2, 4, 64), None)
    _, outputs = agree(residual_norm_modulate, x, modulations, EPS, fast=fast, quantize=True)
    out, eight_bit = outputs[0]
    near = eight_bit.data[1].float() * eight_bit.scale[1]
    assert torch.allclose(near, out[1].float(), rtol=2**-4, atol=1e-2)


def test_roundings_matter(randn, device):
    """One rounding instead of three differs on about a third of the elements: the comparison would notice."""
    x, modulation = randn(1, 40, 64), rows(randn, "token", 1, 40, 64)
    exact, fast = (residual_norm_modulate.twin(x, (modulation,), EPS, fast=fast)[1][0] for fast in (False, True))
    assert float((exact != fast).float().mean()) > 0.15
    assert residual_norm_modulate.contract.difference(exact, fast) is not None


def test_a_gate_needs_a_branch(randn):
    with pytest.raises(ValueError, match="needs a branch"):
        residual_norm_modulate(randn(1, 3, 64), (), EPS, gate=Rows(randn(1, 1, 64)))


def test_operator_and_compilation(randn, device, traced):
    from ltx2_engine.kernels.residual_norm_modulate_triton import launch

    x, branch, (scale, shift) = randn(2, 5, 64), randn(2, 5, 64), rows(randn, "indexed", 2, 5, 64)
    flat = (x, branch, scale.values, scale.index, None, [scale.values, None], [shift.values, None], [scale.index, None])
    torch.library.opcheck(launch.registered, (*flat, EPS, False, False))

    def call(x, branch):
        return residual_norm_modulate(x, ((scale, shift), None), EPS, branch=branch, gate=scale)

    want = call(x, branch)  # also checks the twin, which compiled code does not
    got, operators = traced(call, x, branch)
    assert operators == {"ltx2_engine.residual_norm_modulate.default"}
    assert residual_norm_modulate.contract.difference(want, got) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("width", [2048, 4096])
def test_full_size(agree, width, quantize):
    x, branch = torch.randn(2, 1, 15360, width, device="cuda", dtype=torch.bfloat16)
    values = torch.randn(1, 3, 5, width, device="cuda", dtype=torch.bfloat16)
    index = torch.randint(0, 3, (1, 15360), device="cuda")
    gate, *others = (Rows(values[:, :, j], index) for j in range(5))
    modulations = ((others[0], others[1]), (others[2], others[3]))
    agree(residual_norm_modulate, x, modulations, EPS, branch=branch, gate=gate, quantize=quantize)
