"""Several linear layers on the same tokens as one product."""

import pytest
import torch
import torch.nn.functional as F
from ltx2_engine.kernels import quantize_rows
from ltx2_engine.kernels.fp8 import pack_fp8
from ltx2_engine.ltx2_core.loading.arena import Arena
from ltx2_engine.ltx2_core.loading.linear import LowRank, PackedLinear, PackedWeight
from ltx2_engine.ltx2_core.transformer.projections import Tokens, apply, project
from torch import nn

WIDTHS = {"q": 256, "k": 128, "v": 128}


class Three(nn.Module):
    side_by_side = (("q", "k", "v"),)

    def __init__(self, make):
        super().__init__()
        self.q, self.k, self.v = (make(width) for width in WIDTHS.values())

    @property
    def linears(self):
        return self.q, self.k, self.v


def plain(width):
    linear = nn.Linear(64, width).requires_grad_(False).bfloat16()
    return linear


def packed(width, eight_bit=True):
    linear = plain(width)
    data, scale = pack_fp8(linear.weight, torch.empty(width, 1))
    parts = {"data": data, "scale": scale}
    return PackedLinear(None, PackedWeight("fp8", (width, 64), parts), linear.bias, eight_bit=eight_bit)


def tokens(rows=False):
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    return Tokens(x, quantize_rows(x) if rows else None)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("make", [plain, packed])
def test_layers_side_by_side_are_one_product(make, rows):
    torch.manual_seed(0)
    module = Three(make)
    apart = project(tokens(rows), module.linears)
    Arena.of(module, pin=False)
    together = project(tokens(rows), module.linears)
    assert len({out.untyped_storage().data_ptr() for out in together}) == 1
    assert len({out.untyped_storage().data_ptr() for out in apart}) == 3
    for one, other, linear in zip(together, apart, module.linears, strict=True):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(one, apply(linear, tokens(rows)), atol=1e-2, rtol=1e-2)


def test_a_layer_with_a_branch_is_by_itself():
    torch.manual_seed(0)
    module = Three(packed)
    branch = LowRank(torch.randn(4, 64).bfloat16(), torch.randn(128, 4).bfloat16(), 1.0)
    branch.strength = 1.0
    module.k.branches = nn.ModuleList([branch])
    Arena.of(module, pin=False)
    q, k, v = project(tokens(), module.linears)
    assert len({out.untyped_storage().data_ptr() for out in (q, k, v)}) == 3
    without = k - F.linear(F.linear(tokens().plain, branch.a), branch.b)
    assert float((without - k).norm()) > 1


def test_weights_of_one_scale_are_by_themselves():
    torch.manual_seed(0)

    def whole(width):
        linear = plain(width)
        parts = {"data": linear.weight.to(torch.float8_e4m3fn), "scale": torch.ones(())}
        return PackedLinear(None, PackedWeight("fp8", (width, 64), parts), linear.bias, eight_bit=True)

    module = Three(whole)
    Arena.of(module, pin=False)
    outputs = project(tokens(), module.linears)
    assert [out.shape[-1] for out in outputs] == list(WIDTHS.values())
    assert len({out.untyped_storage().data_ptr() for out in outputs}) == 3
