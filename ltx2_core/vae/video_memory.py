"""Sizes of the video VAE's activations, as pure functions of its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from ..config.video_vae import BlockConfig, ResStackConfig, VideoDecoderConfig, VideoEncoderConfig
from .video_streaming import TOLERANCE

# frames that a convolution sees beyond those of its piece: two, and pieces are not quite equal
_PADDING = 3


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Elements that a layer handles, per latent cell (decoder) or per patch of pixels (encoder).

    inputs: one input frame. outputs: what one input frame becomes. live: the most that exist at once while one input
    frame is worked on, itself included. kept: what stays between pieces of a stream. rate: input frames of this layer
    per latent frame (decoder) or per pixel frame (encoder), in a long clip.
    """

    inputs: float
    outputs: float
    live: float
    kept: float
    rate: float

    def per_cell(self, patches: int) -> LayerCost:
        """The cost of so many patches."""
        inputs, outputs, live, kept = (patches * size for size in (self.inputs, self.outputs, self.live, self.kept))
        return LayerCost(inputs, outputs, live, kept, self.rate)


def decoder_costs(config: VideoDecoderConfig) -> list[LayerCost]:
    """One entry per layer: first convolution, residual blocks and up-samplers in order, last convolution."""
    mirrors = config.padding_mode == "reflect"
    costs = [_conv(config.latent_channels, config.bottleneck_channels, 1.0, 1.0, mirrors)]
    area = rate = 1.0
    for block in config.blocks:
        costs.extend(_block(block, area, rate, mirrors, grow=True))
        if not isinstance(block, ResStackConfig):
            rate *= block.stride[0]
            area *= block.stride[1] * block.stride[2]
    out_channels = config.out_channels * config.patch_size**2
    return [*costs, _conv(config.last_channels, out_channels, area, rate, mirrors)]


def encoder_costs(config: VideoEncoderConfig) -> list[LayerCost]:
    """One entry per layer: first convolution, residual blocks and down-samplers in order, last convolution."""
    mirrors = config.padding_mode == "reflect"
    costs = [_conv(config.in_channels * config.patch_size**2, config.base_channels, 1.0, 1.0, mirrors)]
    channels, area, rate = config.base_channels, 1.0, 1.0
    for block in config.blocks:
        costs.extend(_block(block, area, rate, mirrors, grow=False))
        if not isinstance(block, ResStackConfig):
            channels = block.out_channels
            rate /= block.stride[0]
            area /= block.stride[1] * block.stride[2]
    return [*costs, _conv(channels, config.out_channels, area, rate, mirrors)]


def whole_bytes(costs: list[LayerCost], cells: int, frames: int, dtype_bytes: int) -> int:
    """Peak of a whole pass over ``cells`` (batch x height x width) and ``frames`` in the units of ``costs``."""
    return int(max(cost.live * (cost.rate * (frames - 1) + 1 + _PADDING) for cost in costs) * cells * dtype_bytes)


def decode_stream_bytes(costs: list[LayerCost], cells: int, frames: int, chunk: float, dtype_bytes: int) -> int:
    """Peak of a decoder's stream: what layers keep, a piece at work in one of them, and what waits in pieces before it.

    frames: of the clip. chunk: frames of a piece at the finest stage. Both in the units of ``costs``. Follows
    ``video_streaming.flow``: what is longer than a layer takes is cut, and exists as long as the layers behind it work.
    Layers before the first cut keep nothing.
    """
    finest = costs[-1]
    kept = waiting = working = 0.0
    piece, first, rate = float(frames), 1, 1.0
    for cost in costs:
        # up-sampling along time makes two frames of each but the clip's first
        piece, rate = (piece - first) * cost.rate / rate + first, cost.rate
        longest = max(1.0, chunk * finest.rate * finest.inputs / max(cost.inputs, cost.outputs))
        if piece > TOLERANCE * longest:
            waiting += (piece + 1) * cost.inputs
            # cuts are equal but for a frame
            piece, first = min(longest, piece / ceil(piece / longest) + 1), 0
        kept += cost.kept if waiting else 0.0
        working = max(working, waiting + (piece + _PADDING) * cost.live)
    return int((kept + working) * cells * dtype_bytes)


def encode_stream_bytes(costs: list[LayerCost], cells: int, chunk: float, dtype_bytes: int) -> int:
    """Peak of an encoder's stream, whose pieces of ``chunk`` frames only become smaller on their way."""
    working = max(cost.live * (cost.rate * chunk + _PADDING) for cost in costs)
    return int((sum(cost.kept for cost in costs) + working) * cells * dtype_bytes)


def _conv(in_channels: int, out_channels: int, area: float, rate: float, mirrors: bool) -> LayerCost:
    inputs, outputs = in_channels * area, out_channels * area
    return LayerCost(inputs, outputs, _live(inputs, outputs, mirrors), 2 * inputs, rate)


def _block(block: BlockConfig, area: float, rate: float, mirrors: bool, *, grow: bool) -> list[LayerCost]:
    if isinstance(block, ResStackConfig):
        size = block.channels * area
        # two frames for each convolution, two of the skip where the layers look ahead
        kept = (6 if grow else 4) * size
        return [LayerCost(size, size, _live(size, size, mirrors), kept, rate)] * block.num_layers
    size = block.in_channels * area
    stride = prod(block.stride)
    if grow:
        outputs = block.out_channels * area * stride
        return [LayerCost(size, outputs, _live(size, outputs, mirrors), (3 if block.residual else 2) * size, rate)]
    # input, padded copy, averaged skip and result, each at most as large as the input; one more for the first piece,
    # whose first frame is doubled
    return [LayerCost(size, size, (6 if mirrors else 5) * size, 2 * size, rate)]


def _live(inputs: float, outputs: float, mirrors: bool) -> float:
    # while convolving: the input (or the skip), the padded copy and the result, and a copy that the mirrored border
    # takes; after it, of a layer that shuffles: the input, the result and its shuffled copy
    return max((3 if mirrors else 2) * inputs + outputs, inputs + 2 * outputs)
