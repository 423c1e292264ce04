"""What jobs are made of, as JSON values and a list of tensors, and back.

Frozen dataclasses of a fixed table, by name; numbers, texts, paths and tuples of these. What comes back is checked field by
field against the types that the classes declare, so nothing is built that the sender could not have had.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..av import AV
from ..conditioning.audio import Sound
from ..conditioning.condition import Condition
from ..conditioning.kinds import CONDITIONS
from ..conditioning.latent import AVLatent
from ..host import PreviewSpec
from ..job import SampleJob
from ..model_spec import LoraSpec, ModelSpec
from ..parallel.placement import DTYPE_NAMES
from ..sampling.choice import SamplerChoice
from ..sampling.guidance import StreamGuidance
from ..shapes import ClipShape
from ..text.context import Context
from ..text.enhance import EnhanceRequest

_CLASSES: Mapping[str, type[Any]] = {
    one.__name__: one
    for one in (
        AV,
        AVLatent,
        ClipShape,
        Context,
        EnhanceRequest,
        LoraSpec,
        ModelSpec,
        PreviewSpec,
        SampleJob,
        SamplerChoice,
        Sound,
        StreamGuidance,
        *CONDITIONS.values(),
    )
}
_CONDITIONS = tuple(CONDITIONS.values())
# the key of an object that says what it is
_KIND = "is"
_TENSOR, _PATH = "tensor", "path"
_MAX_DEPTH = 20
# names that classes know only to type checkers
_NAMES = {"Tensor": Tensor}


class CodecError(ValueError):
    """Something that cannot cross between processes, or that has come across and is not what a job is made of."""


def to_json(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` as JSON values; its tensors are appended to ``tensors``. Raises CodecError for other types than the table's."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [to_json(one, tensors) for one in value]
    if isinstance(value, Path):
        return {_KIND: _PATH, "path": str(value)}
    if isinstance(value, Tensor):
        if value.dtype not in DTYPE_NAMES:
            raise CodecError(
                f"tensors of {value.dtype} do not go to workers; these do: {', '.join(DTYPE_NAMES.values())}"
            )
        tensors.append(value)
        return {
            _KIND: _TENSOR,
            "number": len(tensors) - 1,
            "dtype": DTYPE_NAMES[value.dtype],
            "shape": list(value.shape),
        }
    name = type(value).__name__
    if _CLASSES.get(name) is not type(value):
        raise CodecError(f"a {name} does not go to workers; these do: {', '.join(_CLASSES)}")
    fields = {one.name: to_json(getattr(value, one.name), tensors) for one in dataclasses.fields(value)}
    return {_KIND: name, **fields}


def from_json(value: Any, tensors: Sequence[Tensor], kind: Any) -> Any:
    """What ``to_json`` made ``value`` of, a value of the type ``kind``.

    Raises CodecError for an unknown class, for fields that are missing or too many, for a value of another type than its
    field has, and for a tensor that is not there or has another dtype or shape than was said; ValueError for what the class
    itself refuses.
    """
    found = _decoded(value, tensors, 0)
    _check(found, kind, "the value")
    return found


def _decoded(value: Any, tensors: Sequence[Tensor], depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise CodecError(f"values lie inside each other at most {_MAX_DEPTH} deep")
    if isinstance(value, list):
        return tuple(_decoded(one, tensors, depth + 1) for one in value)
    if not isinstance(value, dict):
        return value
    fields = dict(value)
    kind = fields.pop(_KIND, None)
    if kind == _TENSOR:
        return _tensor(fields, tensors)
    if kind == _PATH:
        if set(fields) != {"path"} or not isinstance(fields["path"], str):
            raise CodecError(f"a path is one text, found {str(fields)[:100]}")
        return Path(fields["path"])
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise CodecError(f"{str(kind)[:100]!r} is nothing that crosses between processes")
    return _built(_CLASSES[kind], {name: _decoded(one, tensors, depth + 1) for name, one in fields.items()})


def _tensor(fields: Mapping[str, Any], tensors: Sequence[Tensor]) -> Tensor:
    number = fields.get("number")
    if set(fields) != {"number", "dtype", "shape"} or type(number) is not int or not 0 <= number < len(tensors):
        raise CodecError(f"a tensor is one of {len(tensors)} that came along, found {str(fields)[:100]}")
    found = tensors[number]
    if [DTYPE_NAMES.get(found.dtype), list(found.shape)] != [fields["dtype"], fields["shape"]]:
        raise CodecError(
            f"tensor {number} was announced as {fields['dtype']} of {fields['shape']}; it is {found.dtype} of "
            f"{list(found.shape)}"
        )
    return found


def _built(kind: type[Any], fields: dict[str, Any]) -> Any:
    hints = _hints(kind)
    if fields.keys() != hints.keys():
        unknown, missing = sorted(fields.keys() - hints.keys()), sorted(hints.keys() - fields.keys())
        raise CodecError(f"a {kind.__name__} has the fields {', '.join(hints)}; unknown {unknown}, missing {missing}")
    for name, value in fields.items():
        _check(value, hints[name], f"{name} of a {kind.__name__}")
    return kind(**fields)


def _hints(kind: type[Any]) -> dict[str, Any]:
    found = typing.get_type_hints(kind, localns=_NAMES)
    return {one.name: found[one.name] for one in dataclasses.fields(kind)}


def _check(value: Any, hint: Any, what: str) -> None:
    if not _is(value, hint):
        wanted = getattr(hint, "__name__", None) or str(hint)
        raise CodecError(f"{what} is a {type(value).__name__}; it must be {wanted}")


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a field declares."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and _are(value, parts)
    if origin is AV:
        return type(value) is AV and all(_is(part, parts[0]) for part in value.present())
    if hint is float:
        return type(value) in (int, float)
    if hint in (bool, int, str):
        return type(value) is hint
    if hint in (None, type(None)):
        return value is None
    if hint is Condition:
        return type(value) in _CONDITIONS
    # what a pair holds is for those to say that have the pair
    return isinstance(hint, typing.TypeVar) or isinstance(value, hint)


def _are(values: tuple[Any, ...], kinds: tuple[Any, ...]) -> bool:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return all(_is(value, kinds[0]) for value in values)
    return len(values) == len(kinds) and all(map(_is, values, kinds))
