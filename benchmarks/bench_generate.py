"""A whole generation at full size through the headless runner: time and peak memory of each phase.

python benchmarks/bench_generate.py --version 2.3 --width 768 --height 512 --frames 121 --out benchmarks/results

Checks before it reports: picture and sound are finite and have the promised sizes, and no step of the sampler waits
for the device (counted by torch.cuda.set_sync_debug_mode).
"""

from __future__ import annotations

import argparse
import logging
import re
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path

import pack
import torch
from ltx2_engine import cli
from ltx2_engine.ltx2_core import engine as engine_module
from ltx2_engine.ltx2_core.sampling import samplers
from random_model import random_weights, write_full_size
from report import Row, write

PHASE = re.compile(r"^(.+?): ([\d.]+) s(?:, peak ([\d.]+) GiB)?$")


class Phases(logging.Handler):
    """Collects what the engine logs of its phases."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.rows: list[tuple[str, float, float]] = []

    def emit(self, record):
        match = PHASE.match(record.getMessage())
        if match:
            self.rows.append((match[1], float(match[2]), float(match[3] or 0)))


def watched(sampler, times, waits):
    """The sampler, noting when each step was over on the GPU and every operation that waited for the device."""

    def run(denoise, x, sigmas, noise, choice, on_step):
        events = [_now()]

        def stepped(*args):
            events.append(_now())
            on_step(*args)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                x = sampler(denoise, x, sigmas, noise, choice, stepped)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.extend(str(warning.message) for warning in caught if "synchronizing" in str(warning.message))
        torch.cuda.synchronize()
        times.extend(before.elapsed_time(after) for before, after in pairwise(events))
        return x

    return run


def _now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", default="2.3")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    phases, step_times, waits, clips = Phases(), [], [], []
    logger = logging.getLogger("ltx2.engine")
    logger.setLevel(logging.INFO)
    logger.addHandler(phases)
    samplers.SAMPLERS = {"euler": watched(samplers.sample_euler, step_times, waits)}
    engine_module.SAMPLERS = samplers.SAMPLERS
    decode = engine_module.LocalEngine.decode

    def kept(self, *args):
        clips.append(decode(self, *args))
        return clips[-1]

    engine_module.LocalEngine.decode = kept

    with tempfile.TemporaryDirectory() as folder, random_weights("cuda"):
        root = Path(folder)
        checkpoint, encoder = write_full_size(root / "models", options.version)
        flow = pack.ROOT / "workflows" / "api" / "text_to_video.json"
        settings = {
            "LTX2LoadModel.checkpoint": checkpoint,
            "LTX2LoadModel.text_encoder": encoder,
            "LTX2EmptyLatent.width": options.width,
            "LTX2EmptyLatent.height": options.height,
            "LTX2EmptyLatent.frames": options.frames,
        }
        sets = [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")]
        start = time.perf_counter()
        code = cli.main(["run", str(flow), *sets, "--models", str(root / "models"), "--output", str(root), "--verbose"])
        total = time.perf_counter() - start
        if code != 0:
            raise SystemExit(f"the run failed with exit code {code}")
        videos = list(root.rglob("*.mp4"))
        assert len(videos) == 1, videos

    (clip,) = clips
    assert clip.frames.shape == (options.frames, options.height, options.width, 3), clip.frames.shape
    latents = round(25 * options.frames / 24)
    assert clip.waveform.shape[-1] == clip.sample_rate // 100 * (4 * latents - 3), clip.waveform.shape
    finite = bool(clip.frames.isfinite().all()) and bool(clip.waveform.isfinite().all())
    if not finite:
        raise SystemExit("picture or sound is not finite: no figures")
    for message in waits:
        print(message)
    steps = sorted(step_times)
    rows = [
        *(Row(f"{name}: time", seconds, "s") for name, seconds, _ in phases.rows),
        *(Row(f"{name}: peak memory", peak, "GiB") for name, _, peak in phases.rows),
        Row("sampler step, median", steps[len(steps) // 2], "ms"),
        Row("whole run, files to mp4", total, "s"),
        Row("picture and sound finite", float(finite), "1 = yes", "1"),
        Row("operations of all steps that waited for the device", len(waits), "count", "0"),
    ]
    name = f"generate_{options.version}_{options.height}x{options.width}x{options.frames}"
    print(write(options.out, name, rows).read_text())


if __name__ == "__main__":
    main()
