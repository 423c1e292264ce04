"""One rank of bench_ranks_decode.py: decodes its band of rows with the others, and writes down how long it took.

python benchmarks/ranks_decode.py FOLDER DESCRIPTOR DESCRIPTOR    (of the memory for the frames of both clips)

RANK, LOCAL_RANK and WORLD_SIZE are in the environment, the job is in FOLDER/job.json, the answer goes to FOLDER/RANK.json.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.decoding import decode_video
from ltx2_engine.ltx2_core.networks import build_on_meta
from ltx2_engine.ltx2_core.parallel.bands import WHOLE, Bands, deal
from ltx2_engine.ltx2_core.parallel.collectives import neighbours
from ltx2_engine.ltx2_core.parallel.placement import Placed
from ltx2_engine.ltx2_core.parallel.shared_memory import Segment
from ltx2_engine.ltx2_core.tiny import tiny_config
from ltx2_engine.ltx2_core.vae.tiling import TilePlan, decode, plan_decode
from own_model import DTYPE, drawing, fill
from ranks import Rank, main_of_rank
from shapes import Shape
from timing import GIB, allocated, clean
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """What all ranks do. check: of the clip in float32. free_gib: what a rank's plan may count on. chunk: frames of a
    piece in place of the plan's; 0: the plan's.
    """

    shape: str
    check: str
    repeats: int
    free_gib: float
    tiny: bool
    chunk: int = 0

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_config(tiny_config("2.3") if self.tiny else released_config("2.3"), 49, ())


def frames_place(shape: Shape) -> Placed:
    return Placed("F32", (1, shape.frames, shape.height, shape.width, 3))


def bands_of(rank: Rank, edges: Any, latents: Tensor) -> Bands:
    return WHOLE if rank.size == 1 else Bands(rank.rank, deal(latents.shape[3], rank.size), edges)


def work(rank: Rank, given: dict[str, Any]) -> dict[str, Any]:
    job, descriptors = Job(**given), [int(descriptor) for descriptor in sys.argv[2:]]
    edges = neighbours(rank.device) if rank.size > 1 else None
    config = job.config
    check, shape = Shape.parse(job.check), Shape.parse(job.shape)

    def setting(shape: Shape, dtype: torch.dtype) -> tuple[Any, Tensor, TilePlan]:
        decoder = fill(build_on_meta("video_decoder", config), rank.device, dtype)
        latents = drawing(rank.device, dtype)(1, config.video_vae.latent_channels, *shape.clip.grid)
        free = int(job.free_gib * GIB)
        plan = plan_decode(config.video_vae, tuple(latents.shape), dtype.itemsize, free, ranks=rank.size)
        plan = replace(plan, chunk_frames=job.chunk) if job.chunk else plan
        return decoder, latents, plan

    with Segment(descriptors[0], frames_place(check).end) as segment:
        decoder, latents, _ = setting(check, torch.float32)
        # in pieces, and convolutions in float32 may else use fewer bits
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            frames = segment.tensor(frames_place(check))
            decode_video(decoder, latents, TilePlan(16), frames, bands=bands_of(rank, edges, latents))
    del decoder, latents
    with Segment(descriptors[1], frames_place(shape).end) as segment:
        frames = segment.tensor(frames_place(shape))
        decoder, latents, plan = setting(shape, DTYPE)
        bands, weights = bands_of(rank, edges, latents), allocated(rank.device)

        def to_device() -> None:
            for _ in decode(decoder, latents, plan, bands=bands):
                pass

        clean(rank.device)
        found = {
            "device": rank.times(to_device, job.repeats),
            "host": rank.times(lambda: decode_video(decoder, latents, plan, frames, bands=bands), job.repeats),
        }
    on_gpu = rank.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(rank.device) - weights if on_gpu else 0
    return {"times": found, "peak": peak, "plan": str(plan)}


if __name__ == "__main__":
    main_of_rank(work)
