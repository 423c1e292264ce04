"""One layer of a LoRA file: from its tensors' names, shapes and dtypes to a checked change of one parameter or two."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo, read_tensors
from .errors import lora_error, shown
from .kinds import BIAS_ROLES, KINDS, MAGNITUDE_ROLES, KindError, check_magnitude
from .names import bias_name, weight_name

Parts = Mapping[str, TensorInfo]
# tensors whose few values are part of a layer's formula -> how many numbers they may hold
_NUMBERS = {"alpha": 1, "reshape_weight": 8}
_ALONE = {"diff_b", "b_norm"}
_KNOWN = {*_NUMBERS, *MAGNITUDE_ROLES, *BIAS_ROLES, *(role for kind in KINDS.values() for role in kind.roles)}


@dataclass(frozen=True)
class LoraLayer:
    """What a file changes in one layer or table of the transformer.

    name: the layer's in the file. owner: ours ("blocks.3.video.attn1.to_q"). kind: of ``KINDS``. tensors: role -> the
    tensors that make the weight's difference, none when only the bias changes. bias: role -> what is added to the bias.
    shape: of the weight, None without ``tensors``. rank: None where the algebra has none. alpha: None when absent.
    reshape: the shape that the file wants the weight to have first.
    """

    name: str
    owner: str
    kind: str
    tensors: Parts
    bias: Parts
    shape: tuple[int, ...] | None
    rank: int | None = None
    alpha: float | None = None
    reshape: tuple[int, ...] | None = None

    @property
    def scale(self) -> float:
        """alpha/rank, the factor beside the strength; 1 without either."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @property
    def decomposed(self) -> bool:
        """Whether the weight's magnitudes are replaced too (DoRA)."""
        return not self.tensors.keys().isdisjoint(MAGNITUDE_ROLES)

    @property
    def low_rank(self) -> bool:
        """Whether two matrices beside the weight do the same (``delta.factors``)."""
        return self.kind == "lora" and not self.decomposed

    @property
    def title(self) -> str:
        """The algebra's name for messages."""
        title = KINDS[self.kind].title
        return title if not self.decomposed else "DoRA" if self.kind == "lora" else f"{title} with DoRA"

    @property
    def parameters(self) -> Mapping[str, Parts]:
        """Our names of the parameters that change -> the tensors that change each, by role."""
        both = ((weight_name(self.owner), self.tensors), (bias_name(self.owner), self.bias))
        return {name: parts for name, parts in both if parts}


def read_layers(checkpoint: Checkpoint, named: Mapping[str, tuple[str, Parts]]) -> dict[str, LoraLayer]:
    """Our name of a layer -> what changes in it, of our name -> (name in the file, tensors by role).

    Reads the numbers in the formulas (alphas), nothing else. Raises LoraError for tensors that make no change together.
    """
    numbers = _read_numbers(checkpoint, [parts for _, parts in named.values()])
    return {owner: _layer(checkpoint, name, owner, parts, numbers) for owner, (name, parts) in named.items()}


def _layer(
    checkpoint: Checkpoint, name: str, owner: str, parts: Parts, numbers: Mapping[str, tuple[float, ...]]
) -> LoraLayer:
    kind = _kind(checkpoint, name, parts)
    tensors = {role: info for role, info in parts.items() if role in KINDS[kind].roles or role in MAGNITUDE_ROLES}
    bias = {role: info for role, info in parts.items() if role in BIAS_ROLES}
    for info in (*tensors.values(), *bias.values()):
        if info.dtype not in FLOAT_DTYPES:
            problem = f"tensor {shown(info.name)} is stored as {info.dtype}"
            raise lora_error(checkpoint, problem, f"use a LoRA stored as {', '.join(FLOAT_DTYPES)}")
    try:
        shape, rank = _measure(kind, tensors) if tensors or kind == "lora" else (None, None)
    except KindError as error:
        raise lora_error(checkpoint, f"{shown(name)}: {error.problem}", error.remedy) from error
    alpha, reshape = (numbers[parts[role].name] if role in parts else None for role in _NUMBERS)
    return LoraLayer(
        name=name,
        owner=owner,
        kind=kind,
        tensors=MappingProxyType(tensors),
        bias=MappingProxyType(bias),
        shape=shape,
        rank=rank,
        alpha=None if alpha is None else alpha[0],
        reshape=None if reshape is None else tuple(int(size) for size in reshape),
    )


def _kind(checkpoint: Checkpoint, name: str, parts: Parts) -> str:
    for role, info in parts.items():
        if role not in _KNOWN:
            raise lora_error(
                checkpoint,
                f"tensor {shown(info.name)} makes this a file of another kind: {role}",
                f"these can be used: {', '.join(kind.title for kind in KINDS.values())}, and DoRA",
            )
    there = [kind for kind, entry in KINDS.items() if not entry.roles.isdisjoint(parts)]
    if len(there) > 1:
        titles = " and ".join(KINDS[kind].title for kind in there)
        raise lora_error(checkpoint, f"{shown(name)} has tensors of {titles}", "it must be one of them")
    if there:
        return there[0]
    # a difference of a bias can stand alone; an alpha, a magnitude or the bias of a factor lacks its pair
    return "full" if parts.keys() & _ALONE and parts.keys() <= _ALONE | {"alpha"} else "lora"


def _measure(kind: str, tensors: Parts) -> tuple[tuple[int, ...], int | None]:
    """The shape of the weight and the rank. Raises KindError when the tensors do not belong together."""
    shape, rank = KINDS[kind].measure({role: info.shape for role, info in tensors.items()})
    magnitudes = [role for role in MAGNITUDE_ROLES if role in tensors]
    if magnitudes and (kind == "full" or len(magnitudes) > 1):
        raise KindError(
            f"{' and '.join(magnitudes)} beside {KINDS[kind].title}", "one magnitude beside factors can be used"
        )
    for role in magnitudes:
        check_magnitude(role, tensors[role].shape, shape)
    return shape, rank


def _read_numbers(checkpoint: Checkpoint, layers: Iterable[Parts]) -> dict[str, tuple[float, ...]]:
    """Name of an alpha or a shape -> its values."""
    names = []
    for parts in layers:
        for role, most in _NUMBERS.items():
            if role in parts:
                _check_number(checkpoint, role, parts[role], most)
                names.append(parts[role].name)
    found: dict[str, tuple[float, ...]] = {}
    for name, tensor in read_tensors(checkpoint, names, device="cpu"):
        found[name] = tuple(float(value) for value in tensor.flatten().tolist())
        if not all(map(math.isfinite, found[name])):
            raise lora_error(checkpoint, f"tensor {shown(name)} has values that are no numbers", "get the file again")
    return found


def _check_number(checkpoint: Checkpoint, role: str, info: TensorInfo, most: int) -> None:
    if not 1 <= math.prod(info.shape) <= most:
        wanted = f"an {role} must be one number" if most == 1 else f"a {role} must be at most {most} numbers"
        raise lora_error(checkpoint, f"{shown(info.name)} has shape {list(info.shape)}", wanted)
    if info.dtype not in (*FLOAT_DTYPES, "I64", "I32"):
        raise lora_error(checkpoint, f"tensor {shown(info.name)} is stored as {info.dtype}", "use another file")
