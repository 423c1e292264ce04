"""The block formats of ggml, the format family of GGUF files: a row is cut into blocks that carry their own scales.

All arithmetic is float32, products before differences, and the result is rounded once. Formulas and layouts: ggml's
reference, against which tests compare bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """weights in a block, and the bytes that they take."""

    weights: int
    bytes: int


BLOCKS = {"q8_0": Block(32, 34), "q4_k": Block(256, 144), "q5_k": Block(256, 176), "q6_k": Block(256, 210)}


def unpack_ggml(format: str, data: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """data: uint8, the blocks one after another. Returns a tensor of ``shape`` in ``dtype``."""
    return _UNPACK[format](data.reshape(-1, BLOCKS[format].bytes)).to(dtype).view(*shape)


def packed_bytes(format: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor whose number of elements is a multiple of the block's."""
    block = BLOCKS[format]
    return math.prod(shape) // block.weights * block.bytes


def _q8_0(blocks: Tensor) -> Tensor:
    """fp16 d, 32 int8 q: w = d * q."""
    return _half(blocks[:, :2]) * blocks[:, 2:].view(torch.int8)


def _q4_k(blocks: Tensor) -> Tensor:
    """fp16 d and m, 12 bytes of scales, 128 bytes of nibbles: w = (d * s) * v - m * n."""
    return _affine(blocks, _nibbles(blocks[:, 16:]))


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes before the nibbles: bit j of byte i is the fifth bit of weight i in sub-block j."""
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, None, 16:48] >> bits) & 1
    return _affine(blocks, _nibbles(blocks[:, 48:]) | high << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of nibbles, 64 of upper bit pairs, 16 int8 scales, fp16 d: w = (d * scale) * v, v from -32."""
    count = blocks.shape[0]
    pairs = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    low = blocks[:, :128].reshape(count, 2, 1, 64)
    low = torch.cat((low & 15, low >> 4), 2).view(count, 2, 4, 32)
    high = (blocks[:, 128:192].reshape(count, 2, 1, 32) >> pairs) & 3
    values = (low | high << 4).view(torch.int8) - 32
    scales = _half(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8)
    return scales[..., None] * values.view(count, 16, 16)


def _nibbles(packed: Tensor) -> Tensor:
    """[n, 128] bytes -> [n, 8, 32]: the lower halves of 32 bytes are a sub-block, the upper ones the next."""
    packed = packed.reshape(-1, 4, 1, 32)
    return torch.cat((packed & 15, packed >> 4), 2).view(-1, 8, 32)


def _affine(blocks: Tensor, values: Tensor) -> Tensor:
    """values [n, 8, 32] with the scales and offsets that bytes 0 to 15 of Q4_K and Q5_K blocks hold."""
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((a & 63, c & 15 | a >> 6 << 4), 1)
    offsets = torch.cat((b & 63, c >> 4 | b >> 6 << 4), 1)
    scales, offsets = _half(blocks[:, 0:2]) * scales, _half(blocks[:, 2:4]) * offsets
    return (scales[..., None] * values).sub_(offsets[..., None])


def _half(two_bytes: Tensor) -> Tensor:
    """[n, 2] bytes -> [n, 1] float32."""
    return two_bytes.contiguous().view(torch.float16).to(torch.float32)


_UNPACK = {"q8_0": _q8_0, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k}
