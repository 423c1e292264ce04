"""Weights in packed formats: to plain numbers and, where a format allows it, back.

A packed weight is a few tensors, its parts: "data", and where the format has them "scale", "scale_2" and "input_scale"
(of activations, not used here). Plain torch: nothing waits for the device, nothing moves between devices, and the
temporary memory is a few times one weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .fp8 import pack_fp8, unpack_fp8
from .ggml import BLOCKS, unpack_ggml
from .mxfp8 import unpack_mxfp8
from .nvfp4 import unpack_nvfp4
from .stochastic import round_to_fp8

FORMATS = ("fp8", "fp8_cast", "mxfp8", "nvfp4", *BLOCKS)

# measured on a GPU: bytes of memory that unpacking to bfloat16 takes for a moment, for each weight, the result included
UNPACK_BYTES = {"fp8": 6, "fp8_cast": 2, "mxfp8": 6.25, "nvfp4": 9.25, **dict.fromkeys(BLOCKS, 7.25)}
# formats that a changed weight can be stored in; the others keep their weight and compute changes beside it
REPACKABLE = frozenset({"fp8", "fp8_cast"})


def unpack(format: str, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A weight as plain numbers, of ``shape`` ([out, in] for a matrix) in ``dtype``, on the device of the parts.

    Computed in float32 and rounded once. See the format's file for its parts and formula; ggml data is a flat tensor
    of bytes. Raises ValueError for an unknown format and for a scale that does not fit.
    """
    data = parts["data"]
    if format == "fp8":
        return unpack_fp8(data, parts["scale"], dtype)
    if format == "fp8_cast":
        return data.to(dtype)
    if format == "mxfp8":
        return unpack_mxfp8(data, parts["scale"], dtype)
    if format == "nvfp4":
        return unpack_nvfp4(data, parts["scale"], parts["scale_2"], dtype)
    if format in BLOCKS:
        return unpack_ggml(format, data, shape, dtype)
    raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")


def repack(format: str, weight: Tensor, parts: Mapping[str, Tensor], *, name: str, seed: int = 0) -> dict[str, Tensor]:
    """The parts of a changed weight, of the shapes and dtypes of the old ones; unchanged parts are the old tensors.

    weight: float32 [out, in]. "fp8": a new scale from the largest magnitude, rounded to nearest. "fp8_cast": rounded at
    random in proportion, because rounding to nearest would swallow a LoRA's small changes; ``name`` and ``seed`` choose
    the random numbers, which are the same on every device. Raises ValueError for a format that is not REPACKABLE.
    """
    data = parts["data"]
    if format == "fp8":
        new, scale = pack_fp8(weight, parts["scale"], data.dtype)
        return {**parts, "data": new, "scale": scale}
    if format == "fp8_cast":
        return {**parts, "data": round_to_fp8(weight, data.dtype, name=name, seed=seed)}
    raise ValueError(f"format {format!r} is not stored again; {', '.join(sorted(REPACKABLE))} are")
