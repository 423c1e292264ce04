"""Sizes of the video VAE's activations, as pure functions of its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..config.video_vae import BlockConfig, ResStackConfig, VideoDecoderConfig, VideoEncoderConfig


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Elements that a layer handles, per latent cell (decoder) or per patch of pixels (encoder).

    inputs: one input frame. outputs: what one input frame becomes. kept: what stays between pieces of a stream.
    rate: input frames of this layer per latent frame (decoder) or per pixel frame (encoder), in a long clip.
    """

    inputs: float
    outputs: float
    kept: float
    rate: float


def decoder_costs(config: VideoDecoderConfig) -> list[LayerCost]:
    """One entry per layer: first convolution, residual blocks and up-samplers in order, last convolution."""
    costs = [_conv(config.latent_channels, config.bottleneck_channels, 1.0, 1.0)]
    area = rate = 1.0
    for block in config.blocks:
        costs.extend(_block(block, area, rate, grow=True))
        if not isinstance(block, ResStackConfig):
            rate *= block.stride[0]
            area *= block.stride[1] * block.stride[2]
    out_channels = config.out_channels * config.patch_size**2
    return [*costs, _conv(config.last_channels, out_channels, area, rate)]


def encoder_costs(config: VideoEncoderConfig) -> list[LayerCost]:
    """One entry per layer: first convolution, residual blocks and down-samplers in order, last convolution."""
    costs = [_conv(config.in_channels * config.patch_size**2, config.base_channels, 1.0, 1.0)]
    channels, area, rate = config.base_channels, 1.0, 1.0
    for block in config.blocks:
        costs.extend(_block(block, area, rate, grow=False))
        if not isinstance(block, ResStackConfig):
            channels = block.out_channels
            rate /= block.stride[0]
            area /= block.stride[1] * block.stride[2]
    return [*costs, _conv(channels, config.out_channels, area, rate)]


def whole_bytes(costs: list[LayerCost], cells: int, frames: int, dtype_bytes: int) -> int:
    """Peak of a whole pass over ``cells`` (batch x height x width) and ``frames`` in the units of ``costs``."""
    return int(max(_live(cost) * cost.rate for cost in costs) * cells * frames * dtype_bytes)


def streamed_bytes(costs: list[LayerCost], cells: int, chunk: float, dtype_bytes: int) -> int:
    """Peak of a stream: what the layers keep, a piece at work in the largest layer, and pieces waiting for it.

    chunk: frames of a piece, in the units of ``costs``; a layer at a finer rate gets proportionally more.
    """
    kept = sum(cost.kept for cost in costs)
    working = max(_live(cost) * (chunk * cost.rate + 2) for cost in costs)
    return int((kept + 2 * working) * cells * dtype_bytes)


def _live(cost: LayerCost) -> float:
    # residual block: skip, hidden state, padded copy and convolution result; resampler: input, padded copy, result
    # of the convolution and its shuffled copy
    return 2 * cost.inputs + 2 * cost.outputs


def _conv(in_channels: int, out_channels: int, area: float, rate: float) -> LayerCost:
    return LayerCost(in_channels * area, out_channels * area, 2 * in_channels * area, rate)


def _block(block: BlockConfig, area: float, rate: float, *, grow: bool) -> list[LayerCost]:
    if isinstance(block, ResStackConfig):
        size = block.channels * area
        # two frames for each convolution, two of the skip where the layers look ahead
        return [LayerCost(size, size, (6 if grow else 4) * size, rate)] * block.num_layers
    size = block.in_channels * area
    stride = prod(block.stride)
    outputs = block.out_channels * area * (stride if grow else 1 / stride)
    return [LayerCost(size, outputs if grow else size, (3 if grow and block.residual else 2) * size, rate)]
