"""Thirty clips in a row by one fleet: memory, open files and threads of all its processes stay what they were."""

import gc
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.fleet import requests
from ltx2_engine.ltx2_core.handles import open_engine
from ltx2_engine.ltx2_core.host import use_host
from ltx2_engine.ltx2_core.job import SampleJob
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.parallel.shared_memory import SHARED_MEMORY
from ltx2_engine.ltx2_core.sampling.choice import SamplerChoice
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.ltx2_core.tiny import TEXT_ENCODER, checkpoint_file, write_tiny_set

from .observe import links

CLIP = ClipShape(9, 96, 96, 24.0)
FRAMES_BYTES = CLIP.frames * CLIP.height * CLIP.width * 3 * 4
SETTLED, JOBS = 10, 30
GUIDED = StreamGuidance(cfg=3.0)


@dataclass(frozen=True)
class Held:
    """What a process has: bytes of memory, files, mapped segments, and threads.

    Memory is its own and its part of what it shares with the others; not libraries, whose part depends on who else runs.
    """

    memory: int
    files: int
    segments: int
    threads: int

    @classmethod
    def by(cls, pid):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return cls(
            sum(map(int, re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB", rollup, re.MULTILINE))) * 1024,
            sum(not link.startswith("/proc/") for link in links(pid)),
            Path(f"/proc/{pid}/maps").read_text().count(f"{SHARED_MEMORY}/"),
            psutil.Process(pid).num_threads(),
        )


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    write_tiny_set(tmp_path, "2.3")
    checkpoint, encoder = tmp_path / "checkpoints" / checkpoint_file("2.3"), tmp_path / "text_encoders" / TEXT_ENCODER
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # what a worker frees goes back at once, so that noise does not hide what it keeps
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    # jobs go through shared memory, as large ones do
    monkeypatch.setattr(requests, "_MOST_IN_A_MESSAGE", 0)
    engine = open_engine(ModelSpec.of(checkpoint, encoder, dtype="float32", device="cpu", ranks=2))
    with use_host(StandaloneHost(progress="quiet")), torch.inference_mode():
        yield engine
        engine.close()


def make_clip(engine, number):
    prompts, guidance = (engine.encode(f"a bell rings {number} times"), engine.encode("blurry")), AV(GUIDED, GUIDED)
    given = SampleJob(AVLatent(CLIP), *prompts, guidance, (1.0, 0.6, 0.0), SamplerChoice("euler"), number)
    frames = engine.decode(engine.sample(given), "auto").frames
    assert float(frames.std()) > 0.01


def held(fleet):
    gc.collect()
    workers = fleet._fleet.workers.group._processes.pids()
    return {"parent": Held.by(os.getpid())} | {f"rank {rank}": Held.by(pid) for rank, pid in enumerate(workers)}


def test_what_processes_hold_does_not_grow_from_clip_to_clip(fleet):
    ways = [open_engine(replace(fleet.files.spec, topology=topology)) for topology in ("1x2", "2x1")]
    for number in range(JOBS):
        make_clip(ways[number % 2], number)
        if number + 1 == SETTLED:
            before = held(fleet)
    after = held(fleet)
    assert fleet.generation == 1
    assert len(after) == 3
    for who, now in after.items():
        then = before[who]
        assert all(getattr(now, count) <= getattr(then, count) for count in ("files", "segments", "threads")), who
        grown = (now.memory - then.memory) / FRAMES_BYTES
        # a rank's half of the frames, kept of every job, would be twice that
        assert grown < (JOBS - SETTLED) / 4, f"{who} holds {grown:.1f} clips more"
