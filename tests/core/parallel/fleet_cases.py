"""What tests of fleets share: a host that notes what it is told, jobs on the tiny model, and how clips compare."""

import os
import signal
import time
from dataclasses import replace

import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.image import ImageCondition
from ltx2_engine.ltx2_core.conditioning.keyframe import KeyframeCondition
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.handles import open_engine
from ltx2_engine.ltx2_core.host import PreviewSpec
from ltx2_engine.ltx2_core.job import SampleJob
from ltx2_engine.ltx2_core.sampling.choice import SamplerChoice
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.ltx2_core.testing import assert_close

CLIP = ClipShape(17, 96, 96, 24.0)
OFF = StreamGuidance()
GUIDED = StreamGuidance(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(1,))
SHORT = (1.0, 0.6, 0.0)
# some seconds of work
LONG = tuple(1 - step / 1000 for step in range(1001))


class RecordingHost(StandaloneHost):
    """Notes progress, and calls ``on_step`` with every report of sampling."""

    def __init__(self):
        super().__init__(progress="quiet")
        self.reports, self.pictures = [], []
        self.on_step = self.on_loading = self.on_frames = lambda value: None

    def progress(self, total, label, node_id=None):
        return Recorded(self, total, label)

    def wants_preview(self, channels):
        return PreviewSpec(((0.1, 0.2, 0.3),) * channels, (0.0, 0.0, 0.0))


class Recorded:
    def __init__(self, host, total, label):
        self.host, self.total, self.label, self.value = host, total, label, 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.host.reports.append((self.label, "closed"))

    def step(self, n=1, picture=None):
        self.host.pictures.append(picture)
        self.to(self.value + n)

    def to(self, value, total=None):
        self.value = value
        self.host.reports.append((self.label, value))
        if self.label == "sampling":
            self.host.on_step(value)
        if self.label == "decoding video":
            self.host.on_frames(value)
        if self.label.startswith("loading transformer"):
            self.host.on_loading(value)
        self.host.check_interrupt()


def pids(engine):
    processes = engine._fleet.workers.group._processes
    return [] if processes is None else processes.pids()


def job(single, guidance=OFF, *, sigmas=SHORT, latent=None, sampler="euler", **fields):
    _, positive, negative = single
    latent = AVLatent(CLIP) if latent is None else latent
    return SampleJob(latent, positive, negative, AV(guidance, guidance), sigmas, SamplerChoice(sampler), 3, **fields)


def conditioned():
    image = torch.rand(70, 110, 3, generator=torch.Generator().manual_seed(0))
    return AVLatent(CLIP).with_condition(ImageCondition(image, 0.8, crf=0), KeyframeCondition(image, -1, 0.9, crf=0))


def of_topology(engine, topology):
    return open_engine(replace(engine.files.spec, topology=topology))


def compare(name, got, want, tolerance=1e-5):
    for stream in ("video", "audio"):
        ours, theirs = getattr(got.latents, stream), getattr(want.latents, stream)
        assert float(theirs.std()) > 0.05
        assert_close(f"{name}, {stream}", ours, theirs, tolerance)


def same(got, want):
    return all(map(torch.equal, got.latents.present(), want.latents.present()))


def works(engine, single):
    compare("the next job", engine.sample(job(single)), single[0].sample(job(single)))


def forget(fleet):
    """Have fresh workers begin with the next job."""
    workers = fleet._fleet.workers
    workers.release(workers.devices[0], None)
    assert not workers.group.alive


# of the tiny transformer: three blocks, the rest, and the last word
ALL_PARTS = [5, 5]


def parts_given(folder):
    """How many parts each rank was given in the last reading that they shared, as ``fleet_worker.py`` writes it there. Forgets."""
    files = [folder / f"given-{rank}" for rank in range(2)]
    found = [int(file.read_text()) if file.exists() else 0 for file in files]
    for file in files:
        file.unlink(missing_ok=True)
    return found


def stop_at(recording, step):
    """Have the user stop a job at that step of sampling. Returns the list that gets the time of it."""
    return _once_at(recording, step, recording.interrupt)


def kill_at(recording, step, pid):
    """Have a process killed at that step of sampling. Returns the list that gets the time of it."""
    return _once_at(recording, step, lambda: os.kill(pid, signal.SIGKILL))


def _once_at(recording, step, act):
    done = []

    def on_step(value):
        if value >= step and not done:
            done.append(time.monotonic())
            act()

    recording.on_step = on_step
    return done
