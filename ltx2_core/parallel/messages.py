"""What processes tell each other: a small JSON header with a fixed set of fields, and tensors as safetensors bytes.

Nothing is pickled. Whatever arrives is checked before it is used: lengths against bounds, the header against its fields,
dtypes and shapes against what the format and the receiver allow.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from .placement import DTYPE_NAMES, MAX_DIMS, Placed, is_count
from .shared_memory import Segment

# what a worker sends last about a job, or about its start
ANSWERS = ("ready", "result", "interrupted", "error")
# to a worker go job, stop and close; all others come from one
KINDS = ("job", "stop", "close", "stage", "progress", "refused", *ANSWERS)

MAX_HEADER_BYTES = 1 << 20
MAX_TENSOR_BYTES = 1 << 30
MAX_TENSORS = 1024
MAX_LABEL = 120

# a message begins with this, the length of its header and the length of its tensors
MAGIC = b"LTX2msg\n"
PREFIX = struct.Struct("<8sIQ")


class MessageError(ValueError):
    """A message that is malformed, too large or incomplete. Those after it can be received."""


@dataclass(frozen=True)
class Message:
    """One message. Its sender's rank is not in it: the receiver knows whose end it came from.

    generation: of the group of workers. job: number of the job it is about, 0 for none. stage: where the worker is in it.
    name: what is asked for, or an error's class. body: JSON values. tensors: on the CPU. placed: tensors in ``segment``,
    or in that of the job that is answered.
    """

    kind: str
    generation: int = 0
    job: int = 0
    stage: str = ""
    name: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    placed: Mapping[str, Placed] = field(default_factory=dict)
    segment: Segment | None = None

    def tensor(self, name: str, dtype: torch.dtype, shape: Sequence[int | None]) -> Tensor:
        """The tensor ``name``, which must have the given dtype and shape; None stands for any size.

        Raises MessageError when it is absent or another one.
        """
        found = self.tensors.get(name)
        if found is None:
            raise MessageError(f"{self.kind} needs tensor {name!r}, it has {', '.join(self.tensors) or 'none'}")
        fits = len(shape) == found.dim() and all(
            want in (None, have) for want, have in zip(shape, found.shape, strict=True)
        )
        if found.dtype != dtype or not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise MessageError(f"{name} must be {dtype} of [{wanted}], found {found.dtype} of {list(found.shape)}")
        return found


# to bytes ------------------------------------------------------------------------------------------------------------


def encode(message: Message) -> tuple[bytes, bytes]:
    """A message's first bytes (prefix and header) and the bytes of its tensors.

    Raises MessageError for what a receiver would refuse.
    """
    header = {
        "kind": message.kind,
        "generation": message.generation,
        "job": message.job,
        "stage": message.stage,
        "name": message.name,
        "body": dict(message.body),
        "placed": {name: [place.dtype, place.shape, place.offset] for name, place in message.placed.items()},
        "segment": 0 if message.segment is None else message.segment.num_bytes,
    }
    _check_fields(header)
    try:
        header_bytes = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError(f"the body of {message.kind} is not JSON: {error}") from error
    tensors = _encode_tensors(message.tensors)
    check_lengths(len(header_bytes), len(tensors))
    return PREFIX.pack(MAGIC, len(header_bytes), len(tensors)) + header_bytes, tensors


def _encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    if not tensors:
        return b""
    _check_tensors(tensors)
    # two names of one tensor need memory of their own each
    own = {name: x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, x in tensors.items()}
    return tensors_to_bytes(own)


# from bytes ----------------------------------------------------------------------------------------------------------


def lengths(prefix: bytes) -> tuple[int, int]:
    """The bytes of the header and of the tensors that follow a prefix. Raises MessageError for a bad prefix."""
    magic, header, tensors = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise MessageError(f"a message begins with {MAGIC!r}, found {magic!r}")
    check_lengths(header, tensors)
    return header, tensors


def check_lengths(header: int, tensors: int) -> None:
    if header > MAX_HEADER_BYTES:
        raise MessageError(f"a header has at most {MAX_HEADER_BYTES} bytes, found {header}")
    if tensors > MAX_TENSOR_BYTES:
        raise MessageError(f"tensors of a message have at most {MAX_TENSOR_BYTES} bytes, found {tensors}")


def decode(header: bytes, tensors: bytes, take_segment: Callable[[int], Segment]) -> Message:
    """The message of a header and the bytes of its tensors. Raises MessageError for anything but what ``encode`` makes.

    take_segment: from a size to the segment whose descriptor came along, asked when the header announces one.
    """
    fields = _decode_header(header)
    fields["placed"] = {name: _placed(entry) for name, entry in fields["placed"].items()}
    fields["tensors"] = _decode_tensors(tensors)
    fields["segment"] = take_segment(fields["segment"]) if fields["segment"] else None
    return Message(**fields)


def _decode_header(header: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(
            header.decode(), object_pairs_hook=_no_duplicates, parse_constant=_refuse_number, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise MessageError(f"a header is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise MessageError(f"a header is a JSON object, found {type(fields).__name__}")
    _check_fields(fields)
    return fields


def _decode_tensors(data: bytes) -> dict[str, Tensor]:
    if not data:
        return {}
    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
        raise MessageError(f"the list of a message's tensors has at most {MAX_HEADER_BYTES} bytes")
    try:
        tensors = tensors_from_bytes(bytes(data))
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise MessageError(f"a message's tensors are not safetensors: {error}") from error
    _check_tensors(tensors)
    return tensors


# checks --------------------------------------------------------------------------------------------------------------


def _is_label(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_LABEL and value.isascii() and (value.isprintable() or not value)


_FIELDS = {
    "kind": lambda value: value in KINDS,
    "generation": is_count,
    "job": is_count,
    "stage": _is_label,
    "name": _is_label,
    "body": lambda value: isinstance(value, dict),
    "placed": lambda value: isinstance(value, dict) and len(value) <= MAX_TENSORS,
    "segment": is_count,
}


def _check_fields(fields: Mapping[str, Any]) -> None:
    if fields.keys() != _FIELDS.keys():
        unknown, missing = sorted(fields.keys() - _FIELDS.keys()), sorted(_FIELDS.keys() - fields.keys())
        raise MessageError(f"a header has the fields {', '.join(_FIELDS)}; unknown {unknown}, missing {missing}")
    for name, is_valid in _FIELDS.items():
        if not is_valid(fields[name]):
            raise MessageError(f"field {name} of a header cannot be {str(fields[name])[:100]!r}")


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    if len(tensors) > MAX_TENSORS:
        raise MessageError(f"a message has at most {MAX_TENSORS} tensors, found {len(tensors)}")
    for name, x in tensors.items():
        if not _is_label(name) or x.dtype not in DTYPE_NAMES or x.dim() > MAX_DIMS:
            raise MessageError(f"{name[:100]!r} cannot be a tensor of a message: {x.dtype} with {x.dim()} dimensions")


def _placed(entry: object) -> Placed:
    if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[1], list)):
        raise MessageError(f"a tensor's place is its dtype, shape and offset, found {str(entry)[:100]}")
    try:
        return Placed(entry[0], tuple(entry[1]), entry[2])
    except ValueError as error:
        raise MessageError(str(error)) from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse_number(text)
    return value


def _refuse_number(text: str) -> None:
    raise ValueError(f"{text[:40]} is not a finite number")
