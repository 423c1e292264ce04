"""Every algebra against its formula in float64, written out with numpy."""

import numpy as np
import pytest
import torch
from ltx2_engine.ltx2_core.loading.lora.delta import add_deltas
from ltx2_engine.ltx2_core.loading.lora.kinds import KINDS, KindError, check_magnitude

OUT, IN, RANK = 12, 10, 3
STRENGTH, ALPHA = 0.7, 1.5
EPS = np.finfo(np.float32).eps


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape)).float()


def numbers(tensors):
    return {role: tensor.double().numpy() for role, tensor in tensors.items()}


LORA = {"A": random(RANK, IN), "B": random(OUT, RANK)}
LOHA = {
    "hada_w1_a": random(OUT, RANK),
    "hada_w1_b": random(RANK, IN),
    "hada_w2_a": random(OUT, RANK, seed=1),
    "hada_w2_b": random(RANK, IN, seed=1),
}
# with a core tensor the a factors are [rank, out]
LOHA_CORE = {
    **{f"hada_w{n}_a": random(RANK, OUT, seed=n) for n in (1, 2)},
    **{f"hada_w{n}_b": random(RANK, IN, seed=n) for n in (1, 2)},
    **{f"hada_t{n}": random(RANK, RANK, 1, 1, seed=n) for n in (1, 2)},
}
W1, W2 = {"lokr_w1": random(3, 2)}, {"lokr_w2": random(4, 5)}
W1_PAIR = {"lokr_w1_a": random(3, 2), "lokr_w1_b": random(2, 2)}
W2_PAIR = {"lokr_w2_a": random(4, RANK), "lokr_w2_b": random(RANK, 5)}
W2_CORE = {"lokr_w2_a": random(RANK, 4), "lokr_w2_b": random(RANK, 5), "lokr_t2": random(RANK, RANK, 1, 1)}


def tucker(t, w_b, w_a):
    return np.einsum("ij...,jr,ip->pr...", t, w_b, w_a).reshape(w_a.shape[1], w_b.shape[1])


def factored(t, name):
    if f"lokr_{name}" in t:
        return t[f"lokr_{name}"].reshape(t[f"lokr_{name}"].shape[:2])
    a, b = t[f"lokr_{name}_a"], t[f"lokr_{name}_b"]
    return a @ b if "lokr_t2" not in t or name == "w1" else tucker(t["lokr_t2"], b, a)


# kind, tensors, rank (None: alpha does not count), the difference from the tensors in float64 and the weight
CASES = {
    "lora": ("lora", LORA, RANK, lambda t, w: t["B"] @ t["A"]),
    "loha": (
        "loha",
        LOHA,
        RANK,
        lambda t, w: (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]),
    ),
    "loha with cores": (
        "loha",
        LOHA_CORE,
        RANK,
        lambda t, w: (
            tucker(t["hada_t1"], t["hada_w1_b"], t["hada_w1_a"]) * tucker(t["hada_t2"], t["hada_w2_b"], t["hada_w2_a"])
        ),
    ),
    **{
        f"lokr {name}": ("lokr", tensors, rank, lambda t, w: np.kron(factored(t, "w1"), factored(t, "w2")))
        for name, tensors, rank in (
            ("whole", W1 | W2, None),
            ("whole, of a convolution", W1 | {"lokr_w2": random(4, 5, 1, 1)}, None),
            ("w1 product", W1_PAIR | W2, 2),
            ("w2 product", W1 | W2_PAIR, RANK),
            # the rank is that of w2 when both are products
            ("products", W1_PAIR | W2_PAIR, RANK),
            ("core", W1 | W2_CORE, RANK),
            ("product and core", W1_PAIR | W2_CORE, RANK),
        )
    },
    "full": ("full", {"diff": random(OUT, IN)}, None, lambda t, w: t["diff"]),
    "set": ("full", {"set_weight": random(OUT, IN)}, None, lambda t, w: t["set_weight"] - w),
    "norm": ("full", {"w_norm": random(OUT)}, None, lambda t, w: t["w_norm"]),
}
WEIGHT = random(OUT, IN, seed=5)


def applied(make_layer, kind, tensors, alpha, rank, weight, strength=STRENGTH):
    layer = make_layer(kind, dict.fromkeys(tensors), alpha=alpha, rank=rank)
    return add_deltas(weight, [(layer, tensors, strength)])


def close(got, want):
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.double().numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("case", CASES)
def test_differences_are_the_formulas(layer, case, alpha):
    kind, tensors, rank, difference = CASES[case]
    weight = random(OUT, seed=5) if case == "norm" else WEIGHT
    shape, found_rank = KINDS[kind].measure({role: tuple(tensor.shape) for role, tensor in tensors.items()})
    assert (shape, found_rank) == (tuple(weight.shape), rank)
    scale = 1 if alpha is None or rank is None else alpha / rank
    w = weight.double().numpy()
    close(applied(layer, kind, tensors, alpha, rank, weight), w + STRENGTH * scale * difference(numbers(tensors), w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_stored_dtypes_are_taken_as_they_are(layer, case, dtype):
    kind, tensors, rank, difference = CASES[case]
    tensors = {role: tensor.to(dtype) for role, tensor in tensors.items()}
    weight = (random(OUT, seed=5) if case == "norm" else WEIGHT).to(dtype)
    w = weight.double().numpy()
    close(applied(layer, kind, tensors, None, rank, weight), w + STRENGTH * difference(numbers(tensors), w))


MAGNITUDES = {
    "dora_scale, rows": ("dora_scale", random(OUT, 1).abs()),
    "dora_scale, rows in one dimension": ("dora_scale", random(OUT).abs()),
    "dora_scale, columns": ("dora_scale", random(1, IN).abs()),
    "magnitude": ("magnitude", random(OUT).abs()),
}


def decomposed(name, m, weight, difference, strength):
    """The table of the specification; PEFT's magnitude as its paper has it."""
    changed = weight + difference
    if name == "dora_scale, columns":
        norm = np.linalg.norm(changed, axis=0, keepdims=True) + EPS
    elif name == "magnitude":
        norm = np.linalg.norm(changed, axis=1, keepdims=True)
    else:
        norm = np.linalg.norm(weight, axis=1, keepdims=True) + EPS
    m = m.reshape(1, -1) if name == "dora_scale, columns" else m.reshape(-1, 1)
    return weight + strength * (changed * m / norm - weight)


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("strength", [1.0, STRENGTH, -0.5])
@pytest.mark.parametrize("name", MAGNITUDES)
@pytest.mark.parametrize("case", ["lora", "loha", "lokr products"])
def test_magnitudes(layer, case, name, strength, alpha):
    kind, tensors, rank, difference = CASES[case]
    role, magnitude = MAGNITUDES[name]
    w = WEIGHT.double().numpy()
    scale = 1 if alpha is None else alpha / rank
    want = decomposed(name, magnitude.double().numpy(), w, scale * difference(numbers(tensors), w), strength)
    close(applied(layer, kind, {**tensors, role: magnitude}, alpha, rank, WEIGHT, strength), want)


def test_the_norms_of_rows_differ_between_comfyui_and_peft(layer):
    m = random(OUT, 1).abs()
    comfy, peft = (
        applied(layer, "lora", {**LORA, role: m}, None, RANK, WEIGHT) for role in ("dora_scale", "magnitude")
    )
    assert float((comfy - peft).abs().max()) > 0.1


@pytest.mark.parametrize("seed", [1, 2])
def test_a_square_weight_reads_the_magnitudes_direction_from_its_shape(layer, seed):
    weight = random(4, 4)
    tensors = {"A": random(2, 4), "B": random(4, 2)}
    w, d = weight.double().numpy(), (tensors["B"] @ tensors["A"]).double().numpy()
    for name, shape in (("dora_scale, rows", (4, 1)), ("dora_scale, columns", (1, 4))):
        m = random(*shape, seed=seed)
        got = applied(layer, "lora", {**tensors, "dora_scale": m}, None, 2, weight)
        close(got, decomposed(name, m.double().numpy(), w, d, STRENGTH))


@pytest.mark.reference
def test_a_magnitude_is_what_peft_merges(layer):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    weight = module[0].weight.detach().clone()
    config = peft.LoraConfig(r=RANK, lora_alpha=5, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(module, config)
    tensors = {}
    for key, value in peft.get_peft_model_state_dict(model).items():
        role = next(
            role for name, role in (("lora_A", "A"), ("lora_B", "B"), ("magnitude", "magnitude")) if name in key
        )
        tensors[role] = value.detach().clone() * (1.3 if role == "magnitude" else 1)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.3
    got = applied(layer, "lora", tensors, 5.0, RANK, weight, 1.0)
    merged = model.merge_and_unload()[0].weight
    torch.testing.assert_close(got, merged.detach(), rtol=1e-5, atol=1e-6)


# shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shapes", "message"),
    [
        ("lora", {"A": (3, 4)}, "half a pair without factor B"),
        ("lora", {"B": (3, 4)}, "half a pair without factor A"),
        ("lora", {}, "half a pair without factor A and B"),
        ("lora", {"A": (3, 4), "B": (5, 2)}, r"A \[3, 4\] and B \[5, 2\]"),
        ("lora", {"A": (3, 4, 1), "B": (5, 3)}, r"A \[3, 4, 1\] and B \[5, 3\]"),
        ("lora", {"A": (0, 4), "B": (5, 0)}, r"A \[0, 4\]"),
        ("lora", {"A": (3, 4), "B": (5, 3), "mid": (3, 3)}, "LoCon"),
        ("loha", {"hada_w1_a": (5, 3)}, "no hada_w1_b"),
        ("loha", {"hada_w1_a": (5, 3), "hada_w1_b": (3, 4)}, "no hada_w2_a and no hada_w2_b"),
        (
            "loha",
            {"hada_w1_a": (5, 3), "hada_w1_b": (3, 4), "hada_w2_a": (5, 3), "hada_w2_b": (3, 6)},
            r"\[5, 4\] and \[5, 6\]",
        ),
        (
            "loha",
            {"hada_w1_a": (5, 3), "hada_w1_b": (2, 4), "hada_w2_a": (5, 3), "hada_w2_b": (3, 4)},
            r"hada_w1_a \[5, 3\], hada_w1_b \[2, 4\] do not fit",
        ),
        (
            "loha",
            {
                "hada_w1_a": (3, 5),
                "hada_w1_b": (3, 4),
                "hada_t1": (3, 3, 3, 3),
                "hada_w2_a": (5, 3),
                "hada_w2_b": (3, 4),
            },
            r"hada_t1 \[3, 3, 3, 3\] do not fit",
        ),
        ("lokr", {"lokr_w1": (3, 2)}, "no lokr_w2_a and no lokr_w2_b"),
        ("lokr", {"lokr_w1": (3, 2), "lokr_w2": (3,)}, r"lokr_w2 has shape \[3\]"),
        ("lokr", {"lokr_w1": (3, 2), "lokr_w2": (3, 2, 3, 3)}, r"lokr_w2 has shape \[3, 2, 3, 3\]"),
        ("lokr", {"lokr_w1": (3, 2), "lokr_w2": (3, 0)}, r"lokr_w2 has shape \[3, 0\]"),
        (
            "lokr",
            {"lokr_w1": (3, 2), "lokr_w1_a": (3, 1), "lokr_w2": (3, 3)},
            "lokr_w1 is there whole and as a product",
        ),
        ("full", {"diff": (3,), "set_weight": (3,)}, "diff and set_weight are there for one weight"),
    ],
)
def test_shapes_that_do_not_belong_together(kind, shapes, message):
    with pytest.raises(KindError, match=message):
        KINDS[kind].measure(shapes)


@pytest.mark.parametrize(
    ("role", "shape"), [("dora_scale", (3, 3)), ("dora_scale", ()), ("dora_scale", (4,)), ("magnitude", (1, 4))]
)
def test_magnitudes_of_other_shapes(role, shape):
    with pytest.raises(KindError, match=rf"its {role} has shape .*, the weight \[5, 4\]"):
        check_magnitude(role, shape, (5, 4))
