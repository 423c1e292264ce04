"""One rank of bench_ranks_decode.py: decodes its band of rows with the others, and writes down how long it took.

python benchmarks/ranks_decode.py FOLDER DESCRIPTOR DESCRIPTOR    (of the memory for the frames of both clips)

RANK, LOCAL_RANK and WORLD_SIZE are in the environment, the job is in FOLDER/job.json, the answer goes to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.decoding import decode_video
from ltx2_engine.ltx2_core.networks import build_on_meta
from ltx2_engine.ltx2_core.parallel.bands import WHOLE, Bands, deal
from ltx2_engine.ltx2_core.parallel.collectives import GroupCollectives, join, leave, neighbours
from ltx2_engine.ltx2_core.parallel.placement import Placed
from ltx2_engine.ltx2_core.parallel.shared_memory import Segment
from ltx2_engine.ltx2_core.tiny import tiny_config
from ltx2_engine.ltx2_core.vae.tiling import TilePlan, decode, plan_decode
from own_model import DTYPE, drawing, fill
from shapes import Shape
from timing import GIB, allocated, clean, settle
from torch import Tensor

WARM_UPS = 2


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


@dataclass(frozen=True)
class Rank:
    """This process among those that decode one clip."""

    rank: int
    size: int
    device: torch.device
    neighbours: Any = None

    def bands(self, latents: Tensor) -> Bands:
        if self.size == 1:
            return WHOLE
        return Bands(self.rank, deal(latents.shape[3], self.size), self.neighbours)

    def meet(self) -> None:
        """All ranks go on from here at once."""
        if self.size > 1:
            GroupCollectives().all_gather(torch.zeros(1, device=self.device))
        settle(self.device)

    def times(self, run: Callable[[], Any], repeats: int) -> list[float]:
        """Milliseconds of each repetition, from when all ranks have begun to when this one is done."""
        times = []
        for _ in range(WARM_UPS + repeats):
            self.meet()
            start = time.perf_counter()
            run()
            settle(self.device)
            times.append((time.perf_counter() - start) * 1000)
        return times[WARM_UPS:]


def work(rank: Rank, job: Job, descriptors: list[int]) -> dict[str, Any]:
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
            decode_video(decoder, latents, TilePlan(16), frames, bands=rank.bands(latents))
    del decoder, latents
    with Segment(descriptors[1], frames_place(shape).end) as segment:
        frames = segment.tensor(frames_place(shape))
        decoder, latents, plan = setting(shape, DTYPE)
        bands, weights = rank.bands(latents), allocated(rank.device)

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


def main(folder: Path, descriptors: list[int]) -> None:
    number, size, place = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", place) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    job = Job(**json.loads((folder / "job.json").read_text(encoding="utf-8")))
    rank = Rank(number, size, device)
    if size > 1:
        join(number, size, folder / "store", backend="nccl" if on_gpu else "gloo", timeout=timedelta(minutes=5))
        rank = Rank(number, size, device, neighbours(device))
    with torch.no_grad():
        answer = work(rank, job, descriptors)
    (folder / f"{number}.json").write_text(json.dumps(answer), encoding="utf-8")
    if size > 1:
        leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(descriptor) for descriptor in sys.argv[2:]])
