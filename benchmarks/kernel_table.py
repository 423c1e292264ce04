"""The calls of bench_kernels.py: every variant of every fused operation, on the arguments that it has in the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pack  # noqa: F401
import torch
from kernel_products import both_widths, linear
from ltx2_engine import kernels
from own_model import Draw
from shapes import MIDDLE, SMALL
from torch import Tensor

HEADS = 32
LATENT = 128  # channels
EPS = 1e-6
# noise levels of a step of res_2s
LEVELS = {"sigma": 0.9, "sigma_next": 0.8, "sigma_down": 0.7, "alpha_ratio": 0.9, "fresh": 0.4}
STRENGTHS = {"cfg": 3.0, "stg": 1.0, "modality": 3.0, "rescale": 0.7}

Arguments = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True)
class Tokens:
    """Tokens of a stream [1, tokens, width]."""

    tokens: int
    width: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.width}"


@dataclass(frozen=True)
class Picture:
    """Activations of the video VAE [1, channels, frames, rows, columns]."""

    channels: int
    frames: int
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.frames}x{self.rows}x{self.columns}"

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, self.channels, self.frames, self.rows, self.columns


Size = Tokens | Picture


@dataclass(frozen=True)
class Variant:
    """A way to call an operation.

    make: random arguments for a size. sizes: others than those of the run. flop: operations, where matrix products and not
    the memory decide; the bytes are counted from the arguments and results, see ``moved_bytes``.
    """

    operation: str
    name: str
    make: Callable[[Any, Draw], Arguments]
    sizes: Sequence[Size] | None = None
    flop: Callable[[Any], float] | None = None

    def __str__(self) -> str:
        return f"{self.operation}, {self.name}" if self.name else self.operation


SIZES = (Tokens(MIDDLE.video_tokens, 4096), Tokens(SMALL.video_tokens, 4096), Tokens(SMALL.audio_tokens, 2048))
# 8 frames of 768x1280 in the finest stage of the decoder, and in the one before the last
FINEST, COARSER = Picture(128, 8, 192, 320), Picture(512, 8, 48, 80)
TINY_SIZES = (Tokens(12, 256),)
TINY_PICTURE = Picture(16, 2, 6, 10)


def tokens(size: Tokens, draw: Draw, factor: int = 1) -> Tensor:
    return draw(1, size.tokens, factor * size.width)


def row(size: Tokens, draw: Draw) -> Any:
    """One modulation vector for all tokens, a part of the rows of all branches as in a block."""
    return kernels.Rows(draw(1, 1, 9, size.width)[:, :, 3])


def indexed(size: Tokens, draw: Draw) -> tuple[Any, Any, Any]:
    """Three modulation vectors with one index: kept tokens in front, generated ones behind them."""
    index = torch.zeros(1, size.tokens, dtype=torch.int64, device=draw(1).device)
    index[:, size.tokens // 8 :] = 1
    rows = draw(1, 2, 9, size.width)
    return tuple(kernels.Rows(rows[:, :, j], index) for j in range(3))  # type: ignore[return-value]


def pair(size: Tokens, draw: Draw) -> tuple[Any, Any]:
    rows = draw(1, 1, 9, size.width)
    return kernels.Rows(rows[:, :, 0]), kernels.Rows(rows[:, :, 1])


def norm(size: Tokens, draw: Draw, **options: Any) -> Arguments:
    return (tokens(size, draw), (pair(size, draw),), EPS), options


def modulate(size: Tokens, draw: Draw) -> Arguments:
    return (tokens(size, draw), (pair(size, draw),), None), {}


def norm_indexed(size: Tokens, draw: Draw) -> Arguments:
    scale, shift, _ = indexed(size, draw)
    return (tokens(size, draw), ((scale, shift),), EPS), {}


def norm_twice(size: Tokens, draw: Draw) -> Arguments:
    return (tokens(size, draw), (pair(size, draw), pair(size, draw)), EPS), {}


def residual(size: Tokens, draw: Draw, outputs: int, **options: Any) -> Arguments:
    arguments = {"branch": tokens(size, draw), "gate": row(size, draw)}
    return (tokens(size, draw), (pair(size, draw),) * outputs, EPS), arguments | options


def residual_indexed(size: Tokens, draw: Draw) -> Arguments:
    scale, shift, gate = indexed(size, draw)
    return (tokens(size, draw), ((scale, shift),), EPS), {"branch": tokens(size, draw), "gate": gate}


def tables(size: Tokens, draw: Draw) -> tuple[Tensor, Tensor]:
    shape = 1, HEADS, size.tokens, size.width // HEADS // 2
    return draw(*shape).cos(), draw(*shape).sin()


def rotary(size: Tokens, draw: Draw) -> Arguments:
    heads_first = tokens(size, draw).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return (heads_first, *tables(size, draw)), {}


def one_norm_rotary(size: Tokens, draw: Draw) -> Arguments:
    return (tokens(size, draw), draw(size.width), *tables(size, draw), EPS), {}


def both_norm_rotary(size: Tokens, draw: Draw) -> Arguments:
    weights = draw(size.width), draw(size.width)
    return (tokens(size, draw), tokens(size, draw), *weights, *tables(size, draw), EPS), {}


def weighted_norm(size: Tokens, draw: Draw) -> Arguments:
    return (tokens(size, draw), draw(size.width), EPS), {}


def gates(size: Tokens, draw: Draw, **options: Any) -> Arguments:
    return (tokens(size, draw), draw(1, size.tokens, HEADS)), options


def passes(size: Tokens, draw: Draw) -> Arguments:
    return tuple(draw(1, size.tokens, LATENT) for _ in range(4)), dict(STRENGTHS)


def renoising(size: Tokens, draw: Draw) -> Arguments:
    x, target, noise = (draw(1, size.tokens, LATENT).double() for _ in range(3))
    return (x, target, noise.float()), dict(LEVELS)


def norm_silu(size: Picture, draw: Draw) -> Arguments:
    x = draw(*size.shape)
    return (x, torch.empty_like(x)), {}


def norm_silu_modulated(size: Picture, draw: Draw) -> Arguments:
    (x, out), _ = norm_silu(size, draw)
    vector = 1, size.channels, 1, 1, 1
    return (x, out, (draw(*vector), draw(*vector))), {}


def unfolded(size: Picture, draw: Draw, skip: bool = False) -> Arguments:
    """size: of the result."""
    stride = 2, 2, 2
    coarse = size.frames // 2, size.rows // 2, size.columns // 2
    x = draw(1, 8 * size.channels, *coarse)
    return (x, stride, draw(1, 4 * size.channels, *coarse) if skip else None), {}


def products_of(make: Callable[..., tuple], wider: int, out: int) -> dict[str, Any]:
    """A linear layer from ``wider`` times to ``out`` times the width of the tokens."""
    return {
        "make": lambda size, draw: (make(size.tokens, wider * size.width, out * size.width, draw), {}),
        "flop": lambda size: 2.0 * size.tokens * wider * out * size.width**2,
    }


RNM = "residual_norm_modulate"
VARIANTS = (
    Variant(RNM, "modulate", modulate),
    Variant(RNM, "norm, modulate", norm),
    Variant(RNM, "norm, modulate by index", norm_indexed),
    Variant(RNM, "norm, modulate twice", norm_twice),
    Variant(RNM, "gate, add", lambda size, draw: residual(size, draw, 0)),
    Variant(RNM, "gate, add, norm, modulate", lambda size, draw: residual(size, draw, 1)),
    Variant(RNM, "gate, add, norm, modulate by index", residual_indexed),
    Variant(RNM, "gate, add, norm, modulate twice", lambda size, draw: residual(size, draw, 2)),
    Variant(RNM, "norm, modulate, quantize", lambda size, draw: norm(size, draw, quantize=True)),
    Variant(RNM, "gate, add, norm, modulate, fast", lambda size, draw: residual(size, draw, 1, fast=True)),
    Variant("qk_norm_rotary", "", both_norm_rotary),
    Variant("norm_rotary", "", one_norm_rotary),
    Variant("apply_split_rotary", "", rotary),
    Variant("rms_norm", "", weighted_norm),
    Variant("head_gate", "", gates),
    Variant("head_gate", "quantize", lambda size, draw: gates(size, draw, quantize=True)),
    Variant("gelu_quantize", "4 x width", lambda size, draw: ((tokens(size, draw, 4),), {})),
    Variant("quantize_rows", "", lambda size, draw: ((tokens(size, draw),), {})),
    Variant("gelu_linear", "to 4 x width", **products_of(linear, 1, 4)),
    Variant("fp8_linear", "beside bfloat16", **products_of(both_widths, 1, 1)),
    Variant("fp8_linear", "to 4 x width, beside bfloat16", **products_of(both_widths, 1, 4)),
    Variant("fp8_linear", "from 4 x width, beside bfloat16", **products_of(both_widths, 4, 1)),
    Variant("guidance_combine", "4 passes, 128 wide", passes),
    Variant("res2s_update", "float64, 128 wide", renoising),
    Variant("pixel_norm_silu", "", norm_silu, (FINEST, COARSER)),
    Variant("pixel_norm_silu", "modulated", norm_silu_modulated, (FINEST, COARSER)),
    Variant("depth_to_space", "all axes", unfolded, (FINEST,)),
    Variant("depth_to_space", "all axes, added", lambda size, draw: unfolded(size, draw, skip=True), (FINEST,)),
)


def moved_bytes(arguments: Arguments, result: Any) -> int:
    """Bytes that the operation cannot do without: each argument read once, each result written once.

    Elements that a broadcast repeats are one element. Where the first argument is handed through as a result, it is not
    written; any other argument that is also a result was given to be written to, and is not read.
    """
    given = {_place(tensor): tensor for tensor in leaves(arguments)}
    made = {_place(tensor): tensor for tensor in leaves(result)}
    first = _place(leaves(arguments)[0])
    read = [tensor for place, tensor in given.items() if place == first or place not in made]
    written = [tensor for place, tensor in made.items() if place != first]
    return sum(map(_size, (*read, *written)))


def leaves(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        value = tuple(getattr(value, name) for name in value.__dataclass_fields__)
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, tuple | list) else []


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def _size(tensor: Tensor) -> int:
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count * tensor.element_size()
