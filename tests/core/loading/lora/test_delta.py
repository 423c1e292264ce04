import pytest
import torch
from ltx2_engine.ltx2_core.loading.lora.delta import add_deltas, factors

OUT, IN = 48, 40
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def pair(layer):
    """A function that makes a part: a plain LoRA of random factors."""

    def make(rank, strength, dtype=torch.bfloat16, alpha=None, seed=0, device="cpu"):
        generator = torch.Generator().manual_seed(seed + rank)
        a = torch.randn(rank, IN, generator=generator).to(dtype).to(device)
        b = (torch.randn(OUT, rank, generator=generator) * 0.1).to(dtype).to(device)
        return layer("lora", {"A": None, "B": None}, alpha=alpha, rank=rank), {"A": a, "B": b}, strength

    return make


def weight(dtype=torch.bfloat16, device="cpu"):
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9)).to(dtype).to(device)


def exact(base, parts):
    total = base.double()
    for layer, tensors, strength in parts:
        total = total + strength * layer.scale * (tensors["B"].double() @ tensors["A"].double())
    return total


# float32 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_several_differences_add_up_in_float32_and_the_weight_stays(pair, dtype, device):
    parts = [
        pair(8, 0.7, device=device),
        pair(3, -0.5, torch.float16, alpha=6, device=device),
        pair(5, 1.3, torch.float32, alpha=1, device=device),
    ]
    base = weight(dtype, device)
    before = base.clone()
    got = add_deltas(base, parts)
    assert got.dtype == torch.float32
    assert torch.equal(base, before)
    torch.testing.assert_close(got.double(), exact(base, parts), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rounding_in_the_last_pass_is_the_rounding_of_the_float32_result(pair, dtype, device):
    parts = [pair(8, 0.7, device=device), pair(3, -0.5, torch.float16, device=device)]
    for few in ([], parts[:1], parts):
        wide = add_deltas(weight(torch.bfloat16, device), few)
        assert torch.equal(add_deltas(weight(torch.bfloat16, device), few, dtype=dtype), wide.to(dtype))


def test_no_parts_give_the_weight_in_memory_of_its_own():
    for dtype in DTYPES:
        base = weight(dtype)
        got = add_deltas(base, [])
        assert torch.equal(got, base.float())
        assert got.data_ptr() != base.data_ptr()


def test_order_matters_below_float32_only(pair):
    parts = [pair(8, 0.7), pair(3, -0.5), pair(5, 1.3)]
    forward, back = add_deltas(weight(), parts), add_deltas(weight(), parts[::-1])
    torch.testing.assert_close(forward, back, rtol=1e-6, atol=1e-6)
    assert torch.equal(forward, add_deltas(weight(), parts))


def test_a_strength_and_its_negative_cancel(pair):
    one, other = pair(8, 0.7), pair(8, -0.7)
    assert torch.equal(add_deltas(weight(), [one, other]), weight().float())


def test_a_magnitude_replaces_what_it_finds_in_the_base_whatever_stands_before_it(layer, pair):
    _, tensors, _ = pair(4, 1.0)
    dora = (
        layer("lora", {"A": None, "B": None, "dora_scale": None}, rank=4),
        {
            **tensors,
            "dora_scale": torch.rand(OUT, 1),
        },
    )
    plain = pair(3, 0.5)
    alone = add_deltas(weight(), [(*dora, 0.8)]) - weight().float()
    for parts in ([(*dora, 0.8), plain], [plain, (*dora, 0.8)]):
        got = add_deltas(weight(), parts)
        torch.testing.assert_close(got, add_deltas(weight(), [plain]) + alone, rtol=1e-6, atol=1e-6)


def test_gradients_and_inference_tensors_do_not_get_in_the_way(pair):
    base = torch.nn.Parameter(weight(torch.float32))
    assert not add_deltas(base, [pair(3, 1.0)]).requires_grad
    with torch.inference_mode():
        inference = add_deltas(weight(), [pair(3, 1.0)])
    assert torch.equal(inference, add_deltas(weight(), [pair(3, 1.0)]))


@pytest.mark.gpu
def test_nothing_waits_for_the_device(pair):
    parts = [pair(8, 0.7, device="cuda"), pair(3, -0.5, torch.float32, alpha=6, device="cuda")]
    base = weight(device="cuda")
    add_deltas(base, parts)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        add_deltas(base, parts)
    finally:
        torch.cuda.set_sync_debug_mode(before)


# biases and tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["B_bias", "diff_b", "b_norm"])
def test_biases_are_added_with_the_strength_alone(layer, role):
    bias, change = torch.randn(OUT).bfloat16(), torch.randn(OUT).half()
    with_alpha = layer("lora", {"A": None, "B": None}, {role: None}, alpha=8.0, rank=2)
    got = add_deltas(bias, [(with_alpha, {role: change}, 0.5), (with_alpha, {role: change}, 0.25)])
    torch.testing.assert_close(got.double(), bias.double() + 0.75 * change.double(), rtol=1e-6, atol=1e-6)


def test_tables_take_differences_of_their_shape(layer):
    table, change = torch.randn(9, IN), torch.randn(9, IN).bfloat16()
    got = add_deltas(table, [(layer("full", {"diff": None}), {"diff": change}, -0.5)])
    torch.testing.assert_close(got.double(), table.double() - 0.5 * change.double(), rtol=1e-6, atol=1e-6)


# branches ------------------------------------------------------------------------------------------------------------


def test_factors_of_a_branch_do_what_the_difference_does(pair):
    layer, tensors, strength = pair(4, 0.7, torch.float32, alpha=2)
    a, b, scale = factors(layer, tensors)
    assert a.shape == (4, IN)
    assert b.shape == (OUT, 4)
    assert scale == 0.5
    x, base = torch.randn(5, IN), weight(torch.float32)
    branch = x @ base.T + strength * scale * (x @ a.T) @ b.T
    torch.testing.assert_close(branch, x @ add_deltas(base, [(layer, tensors, strength)]).T, rtol=1e-5, atol=1e-5)


def test_only_plain_pairs_are_branches(layer):
    for other in (
        layer("lora", dict.fromkeys(("A", "B", "dora_scale"))),
        layer("loha", dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))),
        layer("full", {"diff": None}),
    ):
        assert not other.low_rank
        with pytest.raises(ValueError, match=r"in\.file is a .*: it has no two factors"):
            factors(other, {})


# ltx-core ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused_by_ltx_core(ltx_core):
    """What ltx-core's public function makes of a weight."""
    from ltx_core.loader import LoraStateDictWithStrength, apply_loras
    from ltx_core.loader.primitives import StateDict

    def state(tensors):
        return StateDict(tensors, torch.device("cpu"), 0, {torch.bfloat16})

    def fuse(base, parts):
        loras = [
            LoraStateDictWithStrength(
                state({f"x.lora_{role}.weight": t.clone() for role, t in tensors.items()}), strength
            )
            for _, tensors, strength in parts
        ]
        return apply_loras(state({"x.weight": base.clone()}), loras, torch.bfloat16).sd["x.weight"]

    return fuse


@pytest.mark.reference
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_gives_the_bits_of_ltx_core(pair, fused_by_ltx_core, dtype, count):
    strengths = (0.7, -0.31, 1.3, 1.0, 0.25)
    parts = [pair(rank, s, dtype, alpha=17) for rank, s in zip((8, 5, 3, 16, 4), strengths, strict=True)][:count]
    got = add_deltas(weight(), parts, parity="ltx-core", dtype=torch.bfloat16)
    assert torch.equal(add_deltas(weight(), parts, parity="ltx-core"), got.float())
    assert torch.equal(got, fused_by_ltx_core(weight(), parts))
    assert not torch.equal(got, add_deltas(weight(), parts).bfloat16())


def test_parity_knows_plain_pairs_only(layer, pair):
    assert torch.equal(add_deltas(weight(), [], parity="ltx-core"), weight().float())
    for other in (
        layer("full", {"diff": None}),
        layer("lora", dict.fromkeys(("A", "B", "dora_scale"))),
        layer("lora", dict.fromkeys(("A", "B")), {"B_bias": None}),
    ):
        with pytest.raises(ValueError, match="ltx-core has none"):
            add_deltas(weight(), [pair(3, 1.0), (other, {}, 1.0)], parity="ltx-core")
    with pytest.raises(ValueError, match="parity 'exact' is not known; choose float32, ltx-core"):
        add_deltas(weight(), [], parity="exact")
