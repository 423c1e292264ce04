"""Jobs as messages: what the workers of a fleet can be asked for, with which arguments, and how these travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..av import AV
from ..conditioning.latent import AVLatent
from ..host import PreviewSpec
from ..job import SampleJob
from ..model_spec import ModelSpec
from ..parallel.messages import Message
from ..parallel.placement import Placed, lay_out, total_bytes
from ..parallel.shared_memory import Segment
from ..text.enhance import EnhanceRequest
from .codec import CodecError, from_json, to_json

# what a job is called -> its arguments and their types
REQUESTS: Mapping[str, Mapping[str, Any]] = {
    "start": {},
    "encode": {"prompt": str},
    "encode_native": {"parts": AV[Tensor], "mask": Tensor | None},
    "enhance": {"request": EnhanceRequest},
    "sample": {"job": SampleJob, "preview": PreviewSpec | None},
    "upscale": {"latent": AVLatent, "upsampler": Path},
    "decode": {"latent": AVLatent, "tiling": str},
}
FRAMES = "frames"
# what is more goes through shared memory, once for all ranks
_MOST_IN_A_MESSAGE = 64 << 20


@dataclass(frozen=True)
class Request:
    """A job as a worker reads it. out: memory for large results, by name."""

    name: str
    spec: ModelSpec
    arguments: Mapping[str, Any]
    out: Mapping[str, Tensor]


def pack(
    name: str, spec: ModelSpec, arguments: Mapping[str, Any], out: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> Message:
    """A job as a message. out: dtypes and shapes of large results, for which shared memory is reserved.

    Whoever sends it closes its segment. Raises CodecError for what does not travel, SegmentError where there is no room.
    """
    tensors: list[Tensor] = []
    body = {"spec": to_json(spec, tensors)}
    body["arguments"] = {key: to_json(value, tensors) for key, value in arguments.items()}
    named = {str(number): tensor for number, tensor in enumerate(tensors)}
    large = sum(tensor.nbytes for tensor in tensors) > _MOST_IN_A_MESSAGE
    shared = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in named.items()} if large else {}
    places = lay_out({**shared, **out})
    num_bytes = total_bytes(places)
    segment = Segment.reserve(num_bytes) if num_bytes else None
    if large:
        assert segment is not None
        for key, tensor in named.items():
            segment.tensor(places[key]).copy_(tensor)
        named = {}
    return Message("job", name=name, body=body, tensors=named, placed=places, segment=segment)


def unpack(message: Message) -> Request:
    """The job of a message. Raises CodecError for one that is none."""
    kinds = REQUESTS.get(message.name)
    if kinds is None:
        raise CodecError(f"there is no job {message.name!r}; there are {', '.join(REQUESTS)}")
    given = message.body.get("arguments")
    if set(message.body) != {"spec", "arguments"} or not isinstance(given, dict) or given.keys() != kinds.keys():
        raise CodecError(f"{message.name} needs a spec and the arguments {', '.join(kinds) or 'none'}")
    tensors = _tensors(message)
    spec = from_json(message.body["spec"], tensors, ModelSpec)
    arguments = {key: from_json(given[key], tensors, kind) for key, kind in kinds.items()}
    out = {key: _shared(message, place) for key, place in message.placed.items() if not key.isdigit()}
    return Request(message.name, spec, arguments, out)


def _tensors(message: Message) -> list[Tensor]:
    """The tensors of the arguments, in the message or in its segment."""
    shared = {key: _shared(message, place) for key, place in message.placed.items() if key.isdigit()}
    found = {**message.tensors, **shared}
    wanted = [str(number) for number in range(len(found))]
    if sorted(found) != sorted(wanted):
        raise CodecError(f"tensors of a job are numbered, found {', '.join(sorted(found))[:100]}")
    return [found[key] for key in wanted]


def _shared(message: Message, place: Placed) -> Tensor:
    if message.segment is None:
        raise CodecError("a job without shared memory cannot have tensors there")
    return message.segment.tensor(place)
