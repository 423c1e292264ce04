"""How a clip is encoded or decoded within the memory at hand: plans, tiles and their blending.

Time needs no tiles, streaming along it is exact. Space is cut into overlapping tiles only where a stream of the whole
picture does not fit; neighbours are blended with masks that sum to one. Tile arithmetic is that of ltx-core 1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..config.video_vae import VideoVAEConfig
from ..parallel.bands import WHOLE, Bands, deal
from .video_decoder import DECODE_TIMESTEP, DEFAULT_CHUNK_FRAMES, Noise, VideoDecoder
from .video_encoder import VideoEncoder
from .video_memory import decode_stream_bytes, decoder_costs, encode_stream_bytes, encoder_costs, whole_bytes
from .video_streaming import Memory, flow

CHOICES = ("auto", "none", "temporal", "spatial")
OVERLAP = 2
TILE_SIZES = (24, 16, 12, 8)
"""Long side of a tile in latent cells, best first: 768, 512, 384 and 256 pixels."""

CHUNK_SIZES = (64, 48, 32, 24, 16, DEFAULT_CHUNK_FRAMES)
"""Frames in work at once, best first. More would only delay what is copied away behind the last piece."""

# a stream takes at most this part of what the whole clip would take, unless it takes little anyway
_PART_OF_WHOLE = 0.5
_LITTLE_BYTES = 1 << 30

OnChunk = Callable[[int, int], None]
"""(frames done, frames in all); called after every chunk, may raise to stop."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A tile's extent [begin, end) along one axis; ``left`` and ``right`` are the cells shared with its neighbours."""

    begin: int
    end: int
    left: int = 0
    right: int = 0

    def scaled(self, factor: int) -> Interval:
        """The same interval in units ``factor`` times finer."""
        return Interval(self.begin * factor, self.end * factor, self.left * factor, self.right * factor)

    def mask(self, device: torch.device | None = None) -> Tensor:
        """Blending weights [length], fp32: 1 inside, falling over the shared cells without reaching 0."""
        weights = torch.ones(self.length, device=device)
        if self.left:
            weights[: self.left] = _ramp(self.left, device)
        if self.right:
            # one minus the neighbour's ramp rather than a mirrored ramp: the two then sum to exactly 1
            weights[-self.right :] = 1 - _ramp(self.right, device)
        return weights

    @property
    def length(self) -> int:
        return self.end - self.begin

    @property
    def cells(self) -> slice:
        return slice(self.begin, self.end)


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How one encode or decode runs.

    chunk_frames: pixel frames in work at once when streamed along time; None: the whole clip at once.
    tile: (height, width) of a spatial tile in latent cells; None: the whole picture.
    overlap: latent cells that neighbouring tiles share.
    park: keep a tile's stream in host memory while the other tiles run.
    work_bytes: estimate of the device memory needed beside the weights; 0 when nobody estimated.
    """

    chunk_frames: int | None = None
    tile: tuple[int, int] | None = None
    overlap: int = OVERLAP
    park: bool = False
    work_bytes: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if self.chunk_frames is not None and self.chunk_frames < 1:
            raise ValueError(f"a chunk holds at least one frame, got {self.chunk_frames}")
        if self.tile is not None and (self.overlap < 1 or min(self.tile) < 2 * self.overlap):
            raise ValueError(
                f"tiles of {self.tile[0]}x{self.tile[1]} latent cells with overlap {self.overlap}: the overlap must be "
                "at least 1 and at most half a tile"
            )

    def __str__(self) -> str:
        time = "the whole clip at once" if self.chunk_frames is None else f"{self.chunk_frames} frames at a time"
        if self.tile is None:
            return time
        rows, columns = self.tile
        parked = ", parked in host memory" if self.park else ""
        return f"{time}, in tiles of {rows}x{columns} latent cells{parked}"

    def tiles(self, height: int, width: int) -> list[tuple[Interval, Interval]]:
        """Rows and columns of every tile of a latent picture, in reading order."""
        tile_height, tile_width = self.tile or (height, width)
        rows = intervals(height, tile_height, self.overlap)
        columns = intervals(width, tile_width, self.overlap)
        return [(row, column) for row in rows for column in columns]


def intervals(length: int, tile: int, overlap: int) -> tuple[Interval, ...]:
    """Cut an axis into intervals of ``tile`` cells that share ``overlap`` cells; the last one may be shorter."""
    if length <= tile:
        return (Interval(0, length),)
    stride = tile - overlap
    count = (length + tile - 2 * overlap - 1) // stride
    return tuple(
        Interval(
            index * stride,
            min(index * stride + tile, length),
            overlap if index else 0,
            overlap if index < count - 1 else 0,
        )
        for index in range(count)
    )


def plan_decode(
    config: VideoVAEConfig,
    latent_shape: tuple[int, ...],
    dtype_bytes: int,
    free_bytes: int | None,
    choice: str = "auto",
    *,
    ranks: int = 1,
) -> TilePlan:
    """Choose how to decode latents of ``latent_shape`` (B, C, F, H, W).

    dtype_bytes: bytes of one activation element. free_bytes: free device memory without the weights, None when unknown.
    ranks: how many decode it together, in bands of rows. All follow one plan, which the tallest band and the least free
    memory of all ranks decide; ``free_bytes`` is that. Tiles are then columns, as high as the picture.
    choice: "none" (whole clip), "temporal" (streamed along time), "spatial" (streamed, and tiled in space), or "auto":
    streamed, and tiled only where the smallest stream does not fit.
    A stream has the longest pieces that fit into the free memory and into half of what the whole clip would take (or
    into 1 GiB); the shortest when the free memory is unknown. Where nothing fits, the smallest plan of the choice.
    Raises ValueError for another choice.
    """
    batch, _, latent_frames, picture_height, width = latent_shape
    # what neighbours add is two rows of every stage: at the finest, where most is, a part of a latent row
    height = picture_height if ranks == 1 else deal(picture_height, ranks)[0] + 1
    decoder = config.decoder
    costs = decoder_costs(decoder)
    sizes = _Sizes(
        whole_bytes=partial(whole_bytes, costs, frames=latent_frames, dtype_bytes=dtype_bytes),
        stream_bytes=lambda cells, chunk: decode_stream_bytes(
            costs, cells, latent_frames, chunk / decoder.temporal_factor, dtype_bytes
        ),
        kept_bytes=sum(cost.kept for cost in costs) * dtype_bytes,
        batch=batch,
        height=height,
        width=width,
        pixel_frames=decoder.temporal_factor * (latent_frames - 1) + 1,
        pixel_bytes=4 * decoder.out_channels * decoder.spatial_factor**2,
        tiles_in_lockstep=True,
        column_height=picture_height if ranks > 1 else None,
    )
    return _choose(sizes, free_bytes, choice)


def plan_encode(
    config: VideoVAEConfig,
    pixel_shape: tuple[int, ...],
    dtype_bytes: int,
    free_bytes: int | None,
    choice: str = "auto",
) -> TilePlan:
    """Choose how to encode pixels of ``pixel_shape`` (B, 3, F, H, W); the rest as for ``plan_decode``.

    But "auto" takes the whole clip where there is plenty of memory.
    """
    batch, _, frames, height, width = pixel_shape
    encoder = config.encoder
    # layers are measured per patch of pixels, tiles in latent cells
    patches = (encoder.spatial_factor // encoder.patch_size) ** 2
    costs = [cost.per_cell(patches) for cost in encoder_costs(encoder)]
    sizes = _Sizes(
        whole_bytes=partial(whole_bytes, costs, frames=frames, dtype_bytes=dtype_bytes),
        stream_bytes=lambda cells, chunk: encode_stream_bytes(costs, cells, chunk, dtype_bytes),
        kept_bytes=sum(cost.kept for cost in costs) * dtype_bytes,
        batch=batch,
        height=height // encoder.spatial_factor,
        width=width // encoder.spatial_factor,
        pixel_frames=frames,
        pixel_bytes=4 * encoder.in_channels * encoder.spatial_factor**2,
        tiles_in_lockstep=False,
    )
    return _choose(sizes, free_bytes, choice)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """What the plans for one clip are estimated from.

    whole_bytes: (cells) -> bytes of a whole pass. stream_bytes: (cells, pixel frames of a piece) -> bytes of a stream.
    kept_bytes: what a stream keeps per cell. height, width: in latent cells, without the batch; of a band where there
    are several. pixel_bytes: fp32 pixels of one frame of one latent cell, which lie beside the activations.
    column_height: of the picture where its tiles are columns, else None.
    """

    whole_bytes: Callable[[int], int]
    stream_bytes: Callable[[int, int], int]
    kept_bytes: float
    batch: int
    height: int
    width: int
    pixel_frames: int
    pixel_bytes: int
    tiles_in_lockstep: bool
    column_height: int | None = None

    def whole(self) -> TilePlan:
        # the pixels come when the activations are gone
        work = self.whole_bytes(self.batch * self.height * self.width)
        return TilePlan(work_bytes=max(work, self._pixels(self.pixel_frames)))

    def streams(self) -> list[TilePlan]:
        """Streams in pieces of every size that is worth it, the longest first."""
        most = max(_PART_OF_WHOLE * self.whole().work_bytes, _LITTLE_BYTES)
        *longer, shortest = (
            TilePlan(chunk, work_bytes=self._stream(chunk, self.height, self.width)) for chunk in CHUNK_SIZES
        )
        return [*(plan for plan in longer if plan.work_bytes <= most), shortest]

    def tiled(self, chunk_frames: int, long_side: int, *, park: bool) -> TilePlan:
        if self.column_height is None:
            tile = _tile(self.height, self.width, long_side)
            work = self._stream(chunk_frames, *tile)
        else:
            columns = _even(self.width, long_side)
            tile = max(2 * OVERLAP, self.column_height), columns
            work = self._stream(chunk_frames, self.height, min(columns, self.width))
        if self.tiles_in_lockstep and not park:
            areas = [
                rows.length * columns.length for rows, columns in TilePlan(tile=tile).tiles(self.height, self.width)
            ]
            work += int(self.kept_bytes * self.batch * (sum(areas) - max(areas)))
        return TilePlan(chunk_frames, tile, park=park, work_bytes=work)

    def _stream(self, chunk_frames: int, height: int, width: int) -> int:
        work = self.stream_bytes(self.batch * height * width, chunk_frames)
        return work + self._pixels(min(chunk_frames, self.pixel_frames))

    def _pixels(self, pixel_frames: int) -> int:
        # two pieces are on their way at a time
        return 2 * self.pixel_bytes * self.batch * self.height * self.width * pixel_frames


def _choose(sizes: _Sizes, free_bytes: int | None, choice: str) -> TilePlan:
    if choice not in CHOICES:
        raise ValueError(f"tiling {choice!r} is not known; choose one of {', '.join(CHOICES)}")
    plans: list[TilePlan] = []
    # an encoder reads most pictures once, and few frames of them: a whole pass is the simpler one
    if choice == "none" or (choice == "auto" and not sizes.tiles_in_lockstep):
        plans.append(sizes.whole())
    if choice in ("auto", "temporal"):
        plans.extend(sizes.streams())
    if choice in ("auto", "spatial"):
        # parked tiles cross the bus for every chunk, so any size that needs none comes first
        parking = (False, True) if sizes.tiles_in_lockstep else (False,)
        plans.extend(
            sizes.tiled(DEFAULT_CHUNK_FRAMES, long_side, park=park) for park in parking for long_side in TILE_SIZES
        )
    if free_bytes is None:
        return next((plan for plan in plans if plan.chunk_frames == DEFAULT_CHUNK_FRAMES), plans[0])
    return next((plan for plan in plans if plan.work_bytes <= _share(plan) * free_bytes), plans[-1])


def _share(plan: TilePlan) -> float:
    """The part of the free memory that a plan may take: a whole clip only where it is comfortable."""
    return 0.5 if plan.chunk_frames is None else 0.8


def _tile(height: int, width: int, long_side: int) -> tuple[int, int]:
    """A tile in the picture's proportions, its sides cut so that all tiles of an axis are nearly equal."""
    longest = max(height, width)
    sides = (max(2 * OVERLAP, round(long_side * side / longest)) for side in (height, width))
    rows, columns = (_even(length, side) for length, side in zip((height, width), sides, strict=True))
    return rows, columns


def _even(length: int, side: int) -> int:
    """The side that makes as many tiles of an axis as ``side`` does, all nearly equal."""
    count = len(intervals(length, side, OVERLAP))
    return side if count == 1 else -(-(length + OVERLAP * (count - 1)) // count)


def decode(
    decoder: VideoDecoder,
    latents: Tensor,
    plan: TilePlan,
    *,
    decode_timestep: float = DECODE_TIMESTEP,
    noise: Noise = None,
    bands: Bands = WHOLE,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Decode normalised latents [B, C, F, H, W]; yield finished pixels [B, 3, f, 32 H, 32 W] in order of time.

    Chunks lie on the decoder's device, in its dtype or, where tiles were blended, in fp32; each belongs to the caller.
    Exact along time; tiles equal the whole picture away from their seams. ``decode_timestep`` and ``noise`` as in
    ``VideoDecoder``. bands: as there too, of a plan for so many ranks; what is yielded are this rank's rows, those of
    one rank with the same plan. check: called before every layer; may raise to stop, on all ranks at the same place.
    """
    if plan.tile is None:
        return decoder.stream(
            latents, plan.chunk_frames, decode_timestep=decode_timestep, noise=noise, bands=bands, check=check
        )
    if bands.size > 1 and plan.tile[0] < latents.shape[3]:
        raise ValueError(f"{plan}: a picture of {latents.shape[3]} rows on {bands.size} ranks has tiles of all rows")
    return _decode_tiles(decoder, bands.take(decoder.prepare(latents, noise)), plan, decode_timestep, bands, check)


def _decode_tiles(
    decoder: VideoDecoder, z: Tensor, plan: TilePlan, decode_timestep: float, bands: Bands, check: Callable[[], None]
) -> Iterator[Tensor]:
    """Run the tiles in lockstep: every stream gives its next frames before any goes on, so they can be blended."""
    factor, height, width = decoder.config.spatial_factor, *z.shape[3:]
    tiles = plan.tiles(height, width)
    steps = decoder.steps(decode_timestep)
    memories = [Memory(bands) for _ in tiles]
    streams = [
        flow(steps, z[:, :, :, rows.cells, columns.cells], memory, True, plan.chunk_frames, check)
        for (rows, columns), memory in zip(tiles, memories, strict=True)
    ]
    while True:
        canvas: Tensor | None = None
        for (rows, columns), memory, stream in zip(tiles, memories, streams, strict=True):
            if plan.park:
                memory.move(z.device)
            pixels = next(stream, None)
            if plan.park:
                memory.move(torch.device("cpu"))
            if pixels is None:
                # streams give out frames in the same portions whatever the tile's size, so they end together
                assert canvas is None
                return
            if canvas is None:
                shape = (*pixels.shape[:3], height * factor, width * factor)
                canvas = torch.zeros(shape, dtype=torch.float32, device=z.device)
            _blend(canvas, pixels, rows.scaled(factor), columns.scaled(factor))
        assert canvas is not None
        yield canvas


def encode(encoder: VideoEncoder, pixels: Tensor, plan: TilePlan, on_chunk: OnChunk | None = None) -> Tensor:
    """Encode pixels [B, 3, F, H, W] in [-1, 1], on any device, to normalised latents in the encoder's dtype.

    With tiles, ``on_chunk`` counts the frames of every tile. Raises ValueError as ``VideoEncoder`` does.
    """
    factor, frames = encoder.config.spatial_factor, pixels.shape[2]
    chunk_frames = plan.chunk_frames or frames + encoder.config.temporal_factor
    height, width = pixels.shape[3] // factor, pixels.shape[4] // factor
    tiles = plan.tiles(height, width)
    canvas: Tensor | None = None
    for index, (rows, columns) in enumerate(tiles):
        cut = pixels[:, :, :, rows.scaled(factor).cells, columns.scaled(factor).cells] if plan.tile else pixels
        chunks = []
        done = 0
        for chunk in encoder.stream(cut, chunk_frames):
            chunks.append(chunk)
            done += chunk.shape[2]
            if on_chunk is not None:
                frames_done = encoder.config.temporal_factor * (done - 1) + 1
                on_chunk(index * frames + frames_done, len(tiles) * frames)
        latents = torch.cat(chunks, dim=2)
        if len(tiles) == 1:
            return latents
        if canvas is None:
            canvas = torch.zeros((*latents.shape[:3], height, width), dtype=torch.float32, device=latents.device)
        _blend(canvas, latents, rows, columns)
    assert canvas is not None
    return canvas.to(latents.dtype)


def _blend(canvas: Tensor, tile: Tensor, rows: Interval, columns: Interval) -> None:
    """Add a tile, weighted in fp32, to its place on the canvas."""
    mask = rows.mask(tile.device)[:, None] * columns.mask(tile.device)
    canvas[:, :, :, rows.cells, columns.cells] += tile * mask


def _ramp(length: int, device: torch.device | None) -> Tensor:
    return torch.arange(1, length + 1, dtype=torch.float32, device=device) / (length + 1)
