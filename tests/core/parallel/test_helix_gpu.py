"""The fused attention of Helix on a GPU against its definition in float64 on the CPU."""

import pytest
import torch
from ltx2_engine.ltx2_core.parallel import helix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 77), (1, 4099), (33, 33), (130, 517), (5, 0)])
def test_partial_attention_keeps_output_and_statistics(queries, keys, masked):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 16, queries, 256, generator=generator)
    k, v = torch.randn(2, 2, 8, keys, 256, generator=generator)
    visible = torch.rand(2, 1, queries, keys, generator=generator) < 0.6 if masked else None
    if masked:
        visible[1, :, -1] = False  # a row that sees nothing
    q, k, v = (x.to("cuda", torch.bfloat16) for x in (q, k, v))
    got = helix.partial_attention(q, k, v, 256**-0.5, None if visible is None else visible.cuda())
    want = helix.partial_attention(*(x.double().cpu() for x in (q, k, v)), 256**-0.5, visible)
    assert (got.out.dtype, got.lse.dtype) == (torch.bfloat16, torch.float32)
    assert (got.out.double().cpu() - want.out).abs().max() < 0.02 if keys else got.out.abs().max() == 0
    blind = want.lse == -torch.inf
    assert torch.equal(got.lse.cpu() == -torch.inf, blind)
    assert torch.allclose(got.lse.double().cpu()[~blind], want.lse[~blind], atol=2e-3)
