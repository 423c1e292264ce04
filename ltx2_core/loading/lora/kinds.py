"""The algebras of LoRA files: which tensors each takes, for which shape of weight, and the difference that they make.

Written for a weight W [out, in]; s = strength * alpha/rank, and alpha/rank counts as 1 where a file has no alpha.

lora   s * B A                          Hu et al., "LoRA", arXiv 2106.09685
loha   s * (w1_a w1_b) o (w2_a w2_b)    Hyeon-Woo et al., "FedPara", arXiv 2108.06098 (o: elementwise)
lokr   s * kron(w1, w2)                 Yeh et al., "LyCORIS", arXiv 2309.14859; w1 and w2 whole or as products
full   strength * diff, or strength * (set_weight - W)

With a core tensor t of shape [r, r, 1, ...], w_a [r, out] and w_b [r, in], a product of loha and lokr becomes
w_a^T t w_b. Any of the first three may have a magnitude (DoRA, see ``add_decomposed``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .products import add_product, product

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Tensors = Mapping[str, Tensor]

FULL_ROLES = ("diff", "set_weight", "w_norm")
BIAS_ROLES = ("B_bias", "diff_b", "b_norm")
MAGNITUDE_ROLES = ("dora_scale", "magnitude")

_WHOLE = "they must be those of a linear layer"


class KindError(ValueError):
    """Tensors of one layer that make no difference together. problem, remedy: halves of a message."""

    def __init__(self, problem: str, remedy: str = _WHOLE):
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


@dataclass(frozen=True)
class Kind:
    """One algebra.

    roles: tensors that it may have besides alpha and magnitude. measure: shapes by role -> (shape of the weight,
    rank or None), KindError when they do not belong together. add: (total, weight, tensors by role, scale) -> total
    plus scale times the difference, float32 in the memory of ``total`` unless that is None; weight is the base.
    """

    title: str
    roles: frozenset[str]
    measure: Callable[[Shapes], tuple[Shape, int | None]]
    add: Callable[[Tensor | None, Tensor, Tensors, float], Tensor]


def add_decomposed(
    total: Tensor | None, weight: Tensor, kind: Kind, tensors: Tensors, scale: float, strength: float
) -> Tensor:
    """``total`` plus strength * (V * m / |V| - W), where V = W + scale * difference (DoRA, arXiv 2402.09353).

    A magnitude m with a row for every output scales rows, one of shape [1, in] columns. Which norm divides it depends on
    who wrote the file. "magnitude" is PEFT's: the norm of V's rows. "dora_scale" follows ComfyUI, which divides columns
    by the norms of V's columns but rows by the norms of the *base* weight's rows, each plus float32's epsilon.
    """
    base = weight.float()
    changed = kind.add(None, base, tensors, scale).add_(base)
    if "magnitude" in tensors:
        magnitude = tensors["magnitude"].float().reshape(-1, 1)
        norm = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
    elif is_per_row(tuple(tensors["dora_scale"].shape), weight.shape[0]):
        magnitude = tensors["dora_scale"].float().reshape(-1, 1)
        norm = torch.linalg.vector_norm(base, dim=1, keepdim=True) + torch.finfo(torch.float32).eps
    else:
        magnitude = tensors["dora_scale"].float().reshape(1, -1)
        norm = torch.linalg.vector_norm(changed, dim=0, keepdim=True) + torch.finfo(torch.float32).eps
    return _started(total, weight).add_(changed.mul_(magnitude / norm).sub_(base), alpha=strength)


def _started(total: Tensor | None, weight: Tensor) -> Tensor:
    return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if total is None else total


def is_per_row(magnitude: Shape, outputs: int) -> bool:
    """Whether a magnitude has one number for every output, rather than for every input."""
    return magnitude[0] == outputs and math.prod(magnitude) == outputs


def check_magnitude(name: str, shape: Shape, weight: Shape) -> None:
    """Raise KindError unless a magnitude of that shape fits a weight [out, in]."""
    outputs, inputs = weight
    per_row = len(shape) > 0 and is_per_row(shape, outputs)
    per_column = name == "dora_scale" and shape == (1, inputs)
    if not (per_row or per_column):
        raise KindError(
            f"its {name} has shape {list(shape)}, the weight {list(weight)}", "it must be [out, 1] or [1, in]"
        )


# lora ----------------------------------------------------------------------------------------------------------------


def _measure_lora(shapes: Shapes) -> tuple[Shape, int]:
    if "mid" in shapes:
        raise KindError(
            "a LoCon with a middle factor is for convolutions", "the transformer has none: use another file"
        )
    a, b = shapes.get("A"), shapes.get("B")
    if a is None or b is None:
        missing = " and ".join(role for role in ("A", "B") if role not in shapes)
        raise KindError(f"half a pair without factor {missing}", "the file is incomplete: get it again")
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise KindError(
            f"the factors have shapes A {list(a)} and B {list(b)}",
            "they must be A [rank, in] and B [out, rank] of a linear layer",
        )
    return (b[0], a[1]), a[0]


def _add_lora(total: Tensor | None, weight: Tensor, tensors: Tensors, scale: float) -> Tensor:
    return add_product(total, tensors["B"], tensors["A"], scale)


# loha ----------------------------------------------------------------------------------------------------------------


def _measure_loha(shapes: Shapes) -> tuple[Shape, int]:
    halves = [_measure_product(shapes, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2)]
    if halves[0][0] != halves[1][0]:
        raise KindError(
            f"its halves are for weights {list(halves[0][0])} and {list(halves[1][0])}", "they must be equal"
        )
    return halves[0]


def _add_loha(total: Tensor | None, weight: Tensor, tensors: Tensors, scale: float) -> Tensor:
    halves = [_product(tensors, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2)]
    return _started(total, weight).addcmul_(halves[0], halves[1], value=scale)


# lokr ----------------------------------------------------------------------------------------------------------------


def _measure_lokr(shapes: Shapes) -> tuple[Shape, int | None]:
    (rows1, columns1), rank1 = _measure_factor(shapes, "lokr_w1")
    (rows2, columns2), rank2 = _measure_factor(shapes, "lokr_w2")
    return (rows1 * rows2, columns1 * columns2), rank1 if rank2 is None else rank2


def _measure_factor(shapes: Shapes, name: str) -> tuple[Shape, int | None]:
    if name not in shapes:
        return _measure_product(shapes, f"{name}_a", f"{name}_b", name.replace("_w", "_t"))
    if f"{name}_a" in shapes or f"{name}_b" in shapes:
        raise KindError(f"{name} is there whole and as a product", "it must be one of them")
    whole = shapes[name]
    if len(whole) < 2 or math.prod(whole[2:]) != 1 or not math.prod(whole):
        raise KindError(f"{name} has shape {list(whole)}")
    return whole[:2], None


def _add_lokr(total: Tensor | None, weight: Tensor, tensors: Tensors, scale: float) -> Tensor:
    w1, w2 = _factor(tensors, "lokr_w1"), _factor(tensors, "lokr_w2")
    total = _started(total, weight)
    blocks = total.view(w1.shape[0], w2.shape[0], w1.shape[1], w2.shape[1])
    blocks.addcmul_(w1[:, None, :, None], w2[None, :, None, :], value=scale)
    return total


def _factor(tensors: Tensors, name: str) -> Tensor:
    if name in tensors:
        return tensors[name].flatten(1).float()
    return _product(tensors, f"{name}_a", f"{name}_b", name.replace("_w", "_t"))


# products of loha and lokr -------------------------------------------------------------------------------------------


def _measure_product(shapes: Shapes, name_a: str, name_b: str, name_t: str) -> tuple[Shape, int]:
    missing = [name for name in (name_a, name_b) if name not in shapes]
    if missing:
        raise KindError(f"there is no {' and no '.join(missing)}", "the file is incomplete: get it again")
    a, b, t = shapes[name_a], shapes[name_b], shapes.get(name_t)
    wrong = KindError(
        f"{name_a} {list(a)}, {name_b} {list(b)}{'' if t is None else f' and {name_t} {list(t)}'} do not fit"
    )
    if len(a) != 2 or len(b) != 2 or not math.prod(a + b):
        raise wrong
    if t is None:
        if a[1] != b[0]:
            raise wrong
        return (a[0], b[1]), b[0]
    if len(t) < 2 or math.prod(t[2:]) != 1 or t[:2] != (a[0], b[0]):
        raise wrong
    return (a[1], b[1]), b[0]


def _product(tensors: Tensors, name_a: str, name_b: str, name_t: str) -> Tensor:
    a, b, t = tensors[name_a], tensors[name_b], tensors.get(name_t)
    return product(a, b) if t is None else product(a.t(), product(t.flatten(1), b))


# full ----------------------------------------------------------------------------------------------------------------


def _measure_full(shapes: Shapes) -> tuple[Shape, None]:
    there = [role for role in FULL_ROLES if role in shapes]
    if len(there) != 1:
        raise KindError(f"{' and '.join(there)} are there for one weight", "it must be one of them")
    return shapes[there[0]], None


def _add_full(total: Tensor | None, weight: Tensor, tensors: Tensors, scale: float) -> Tensor:
    total = _started(total, weight)
    if "set_weight" in tensors:
        return total.add_(tensors["set_weight"], alpha=scale).sub_(weight, alpha=scale)
    return total.add_(next(tensors[role] for role in FULL_ROLES if role in tensors), alpha=scale)


KINDS: Mapping[str, Kind] = {
    "lora": Kind("LoRA", frozenset(("A", "B", "mid")), _measure_lora, _add_lora),
    "loha": Kind(
        "LoHa",
        frozenset(f"hada_{name}" for name in ("w1_a", "w1_b", "t1", "w2_a", "w2_b", "t2")),
        _measure_loha,
        _add_loha,
    ),
    "lokr": Kind(
        "LoKr",
        frozenset(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        _measure_lokr,
        _add_lokr,
    ),
    "full": Kind("full difference", frozenset(FULL_ROLES), _measure_full, _add_full),
}
