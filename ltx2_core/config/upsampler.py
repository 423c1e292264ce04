"""Configuration of a latent upsampler, read from its file's metadata or told from its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .fields import ConfigError, Section

NORM_GROUPS = 32

_MAX_BLOCKS = 64
_RELEASED = "released are spatial x2, spatial x1.5 and temporal x2"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpsamplerConfig:
    """A latent upsampler: spatial x2, spatial x1.5 or temporal x2.

    spatial_ratio: growth of height and of width; 1 for a temporal one.
    temporal: whether F frames become 2F - 1.
    rational: a spatial one that enlarges by the ratio's numerator, then blurs and keeps every denominator-th cell;
        names its tensors in its own way even where the denominator is 1.
    """

    latent_channels: int
    mid_channels: int
    num_blocks_per_stage: int
    spatial_ratio: Fraction
    temporal: bool
    rational: bool

    def __post_init__(self):
        if self.mid_channels % NORM_GROUPS:
            raise ConfigError(
                f"the upsampler's mid_channels is {self.mid_channels}; it must be a multiple of {NORM_GROUPS}, the "
                "groups of its norms"
            )

    @property
    def num_stages(self) -> int:
        """Steps of one run, for progress: the residual blocks and the resampler between them."""
        return 2 * self.num_blocks_per_stage + 1

    def output_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent (frames, height, width) that come out for those that go in; x1.5 rounds odd sizes up."""
        up, down = self.spatial_ratio.numerator, self.spatial_ratio.denominator
        height, width = ((up * size - 1) // down + 1 for size in (height, width))
        return 2 * frames - 1 if self.temporal else frames, height, width

    def __str__(self) -> str:
        return "temporal x2" if self.temporal else f"spatial x{float(self.spatial_ratio):g}"

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> UpsamplerConfig:
        """Read the flat configuration of an upsampler file's metadata; absent keys as in ltx-core 1.0.0.

        Raises ConfigError for a kind of upsampler that was never released.
        """
        section = Section("config", config)
        section.only("dims", 3)
        spatial = section.flag("spatial_upsample", True)
        temporal = section.flag("temporal_upsample", False)
        if spatial == temporal:
            raise ConfigError(
                f"{section.name}.spatial_upsample and temporal_upsample are both {'true' if spatial else 'false'}; "
                f"this engine supports one of them: {_RELEASED}"
            )
        # a temporal file may carry a scale and a resampler that say nothing about it
        rational = spatial and section.flag("rational_resampler", False)
        return UpsamplerConfig(
            latent_channels=section.integer("in_channels", 128, high=4096),
            mid_channels=section.integer("mid_channels", 512, high=16384),
            num_blocks_per_stage=section.integer("num_blocks_per_stage", 4, high=_MAX_BLOCKS),
            spatial_ratio=_spatial_ratio(section, rational) if spatial else Fraction(1),
            temporal=temporal,
            rational=rational,
        )

    @staticmethod
    def from_shapes(shapes: Mapping[str, Sequence[int]]) -> UpsamplerConfig:
        """Tell the configuration from name -> shape, for a file that carries none.

        A resampler that enlarges by 3 is taken for x1.5, the released one; x0.75 has the same tensors.
        Raises ConfigError when the tensors are of no released upsampler.
        """
        mid, channels = _shape(shapes, "initial_conv.weight", (5,))[:2]
        rational = "upsampler.conv.weight" in shapes
        name = "upsampler.conv.weight" if rational else "upsampler.0.weight"
        conv = _shape(shapes, name, (4, 5))
        growth = 0 if conv[0] % mid else conv[0] // mid
        temporal = not rational and len(conv) == 5 and growth == 2
        ratios = {4: Fraction(2), 9: Fraction(3, 2)} if rational else {4: Fraction(2)}
        if not temporal and (len(conv) != 4 or growth not in ratios):
            raise ConfigError(f"{name} is {list(conv)} for {mid} channels, as in no released upsampler: {_RELEASED}")
        blocks = {name.split(".")[1] for name in shapes if name.startswith("res_blocks.")}
        if not 1 <= len(blocks) <= _MAX_BLOCKS:
            raise ConfigError(f"the upsampler has {len(blocks)} res_blocks; allowed are 1 to {_MAX_BLOCKS}")
        return UpsamplerConfig(
            latent_channels=channels,
            mid_channels=mid,
            num_blocks_per_stage=len(blocks),
            spatial_ratio=Fraction(1) if temporal else ratios[growth],
            temporal=temporal,
            rational=rational,
        )


def _spatial_ratio(section: Section, rational: bool) -> Fraction:
    # a plain one always doubles: another scale beside it would be a contradiction
    return Fraction(section.only("spatial_scale", *((2.0, 1.5) if rational else (2.0,))))


def _shape(shapes: Mapping[str, Sequence[int]], name: str, dimensions: tuple[int, ...]) -> tuple[int, ...]:
    if name not in shapes:
        raise ConfigError(f"tensor {name} is missing, which every latent upsampler of its kind has")
    shape = tuple(shapes[name])
    if len(shape) not in dimensions or math.prod(shape) == 0:
        allowed = " or ".join(str(count) for count in dimensions)
        raise ConfigError(f"tensor {name} is {list(shape)}; it must have {allowed} dimensions, none of them empty")
    return shape
