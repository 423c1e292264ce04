"""Where tensors lie in a block of bytes: their dtypes by name, shapes and offsets, checked before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# by the names of the safetensors format
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_DIMS = 8
MAX_BYTES = 1 << 48
# of every tensor's first byte: what vector instructions and copies to a device like best
_ALIGNMENT = 64


@dataclass(frozen=True)
class Placed:
    """A contiguous tensor's place in a block of bytes.

    dtype: a name of ``DTYPES``. offset: of its first byte, a multiple of the element's size.
    Raises ValueError for anything else.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, found {self.dtype!r}")
        if not (len(self.shape) <= MAX_DIMS and all(is_count(size) for size in self.shape)):
            raise ValueError(f"a shape has at most {MAX_DIMS} sizes of 0 or more, found {self.shape}")
        if not (is_count(self.offset) and self.offset % self.torch_dtype.itemsize == 0):
            raise ValueError(f"offset must be a multiple of {self.torch_dtype.itemsize}, found {self.offset!r}")
        if self.end > MAX_BYTES:
            raise ValueError(f"{self.dtype} of {self.shape} at {self.offset} ends beyond {MAX_BYTES} bytes")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.offset + self.num_elements * self.torch_dtype.itemsize


def is_count(value: object) -> bool:
    """Whether a value from outside is an integer of 0 or more that fits into 63 bits; True and False are none."""
    return type(value) is int and 0 <= value < 1 << 63


def lay_out(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Placed]:
    """Places for tensors of the given dtypes and shapes one behind the other, each at a multiple of 64 bytes."""
    places: dict[str, Placed] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        places[name] = Placed(DTYPE_NAMES[dtype], tuple(shape), -(-end // _ALIGNMENT) * _ALIGNMENT)
        end = places[name].end
    return places


def total_bytes(places: Mapping[str, Placed]) -> int:
    return max((place.end for place in places.values()), default=0)
