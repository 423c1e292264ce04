"""bench_kernels.py with an operation of our own, and its table with the real ones' definitions."""

from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Doubling:
    """An operation whose twin is off by ``error``."""

    error: float = 0.0
    reason: str | None = None
    name = "doubling"

    @property
    def contract(self):
        return self

    def difference(self, want, got):
        return None if torch.equal(want, got) else "other numbers"

    def warm_up(self, x):
        return self.reason

    def definition(self, x):
        return 2 * x

    def twin(self, x):
        return x + x + self.error


@pytest.fixture
def bench(module):
    return module("bench_kernels")


@pytest.fixture
def table(module):
    return module("kernel_table")


@pytest.fixture
def run(bench, table, monkeypatch):
    """A function from an operation to the rows of the script."""
    variant = table.Variant("doubling", "as a test", lambda size, draw: ((table.tokens(size, draw),), {}))
    monkeypatch.setattr(table, "VARIANTS", (variant,))

    def run(operation):
        monkeypatch.setattr(bench, "operations", lambda: {"doubling": operation})
        return bench.main(["--tiny"])

    return run


def test_an_operation_has_its_times_and_its_share_of_the_bandwidth(run, values):
    found = values(run(Doubling()))
    what = "doubling, as a test: 12x256"
    moved = 2 * 12 * 256 * 2
    assert found[f"{what}: rate"] == pytest.approx(moved / found[f"{what}: twin"] / 1000)
    assert found[f"{what}: share of copy bandwidth"] == pytest.approx(found[f"{what}: rate"] / found["copy"])
    assert found[f"{what}: definition / twin"] > 0


def test_a_wrong_twin_has_no_figures(run):
    with pytest.raises(SystemExit, match=r"no figures of doubling, as a test: 12x256 \(other numbers\)"):
        run(Doubling(error=1.0))
    with pytest.raises(SystemExit, match="failed its check"):
        run(Doubling(reason="failed its check"))


def test_where_no_twin_runs_the_definition_is_measured(run, values):
    found = values(run(Doubling(reason="not on a GPU")))
    assert found["doubling, as a test: 12x256: definition"] > 0
    assert not [name for name in found if "twin" in name]


def test_broadcast_and_shared_memory_is_counted_once(table):
    x = torch.zeros(2, 6, 8)
    wide = torch.zeros(1, 1, 8).expand(2, 6, 8)
    assert table.moved_bytes(((x, wide), {"again": x}), x + wide) == 4 * (96 + 8 + 96)
    # handed through, and written to
    assert table.moved_bytes(((x,), {}), (x,)) == 4 * 96
    out = torch.zeros_like(x)
    assert table.moved_bytes(((x, out), {}), out) == 4 * (96 + 96)


def test_a_product_is_right_within_its_noise(module):
    products = module("kernel_products")
    product = products.Product("a product", None, None, 0.998)
    x = torch.randn(1, 64, 64)
    assert product.difference(x, x + 0.03 * torch.randn(x.shape)) is None
    assert product.difference(x, x.roll(1, 0) + 0.3 * torch.randn(x.shape)).startswith("cosine 0.9")
    late = x.expand(1, 64, 64).repeat(1, 20, 1)
    spoilt = late.clone()
    spoilt[0, -1, -1] = float("nan")
    assert product.difference(late, spoilt) == "cosine nan, at least 0.998"


def test_every_variant_fits_its_operation_and_moves_what_the_formula_says(bench, table):
    operations = bench.operations()
    if not operations:
        pytest.skip("there are no fused operations yet")
    size = table.Tokens(512, 256)
    one = 512 * 256 * 2
    want = {  # in tensors of all tokens; rows and weights are small beside them
        "residual_norm_modulate, modulate": 2,
        "residual_norm_modulate, norm, modulate": 2,
        "residual_norm_modulate, norm, modulate twice": 3,
        "residual_norm_modulate, gate, add": 3,
        "residual_norm_modulate, gate, add, norm, modulate": 4,
        "residual_norm_modulate, gate, add, norm, modulate twice": 5,
        "qk_norm_rotary": 5,
        "norm_rotary": 3,
        "apply_split_rotary": 3,
        "rms_norm": 2,
        "head_gate": 2 + 32 / 256,  # gates of 32 heads
        "head_gate, quantize": 1.5 + 32 / 256,
        "gelu_quantize, 4 x width": 6,
        "quantize_rows": 1.5,
    }
    found = {}
    for variant in table.VARIANTS:
        if variant.operation in operations:
            own = size if variant.sizes is None else table.TINY_PICTURE
            arguments = variant.make(own, bench.drawing_on(torch.device("cpu")))
            result = operations[variant.operation].definition(*arguments[0], **arguments[1])
            found[str(variant)] = table.moved_bytes(arguments, result) / one
    for name in want.keys() & found.keys():
        assert found[name] == pytest.approx(want[name], rel=0.03), name
