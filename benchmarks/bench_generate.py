"""A whole generation at full size through the headless runner: time and peak memory of each phase.

python benchmarks/bench_generate.py --flow text_to_video --width 768 --height 512 --frames 121
python benchmarks/bench_generate.py --flow hq_two_stage --compare

--compare also times a step of the first stage with split and with batched passes.
Checks before it reports: the video has the promised frames, picture and sound are finite. Operations that make the host
wait for the device inside the sampler's loop are counted (torch.cuda.set_sync_debug_mode).
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import pack
import torch
from ltx2_engine import cli
from ltx2_engine.ltx2_core import engine as engine_module
from ltx2_engine.ltx2_core.sampling import samplers
from random_model import random_weights, write_full_size, write_full_size_lora, write_full_size_upsampler
from report import Row, write

PHASE = re.compile(r"^(.+?): ([\d.]+) s(?:, peak ([\d.]+) GiB)?$")
LORA_RANK = 384


class Phases(logging.Handler):
    """Collects what the engine logs of its phases, numbered where a name comes again."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.rows: list[tuple[str, float, float]] = []
        self._seen: Counter[str] = Counter()

    def emit(self, record):
        match = PHASE.match(record.getMessage())
        if match:
            self._seen[match[1]] += 1
            name = match[1] if self._seen[match[1]] == 1 else f"{match[1]} ({self._seen[match[1]]})"
            self.rows.append((name, float(match[2]), float(match[3] or 0)))


class Watch:
    """Runs samplers while noting when each step was over on the GPU and what waited for the device."""

    def __init__(self):
        self.steps: list[list[float]] = []
        self.waits: list[str] = []
        self.jobs: list[tuple] = []

    def around(self, sampler):
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
            self.waits.extend(str(one.message) for one in caught if "called a synchronizing" in str(one.message))
            torch.cuda.synchronize()
            self.steps.append([before.elapsed_time(after) for before, after in pairwise(events)])
            return x

        return run


def _now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def settings(flow: dict, root: Path, options: argparse.Namespace) -> dict[str, object]:
    """--set values that put random full-size files, and the size asked for, into a workflow."""
    checkpoint, encoder = write_full_size(root, options.version)
    made = {
        "LTX2LoadModel": {"checkpoint": lambda: checkpoint, "text_encoder": lambda: encoder},
        "LTX2LoadLora": {"lora": lambda: write_full_size_lora(root, options.version, LORA_RANK)},
        "LTX2UpscaleLatent": {"upsampler": lambda: write_full_size_upsampler(root)},
    }
    chosen = {
        f"{key}.{name}": value()
        for key, node in flow.items()
        for name, value in made.get(node["class_type"], {}).items()
    }
    for key, node in flow.items():
        if node["class_type"] == "LTX2EmptyLatent":
            sizes = {"width": options.width, "height": options.height, "frames": options.frames}
            chosen |= {f"{key}.{name}": value for name, value in sizes.items() if value}
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flow", default="text_to_video")
    parser.add_argument("--version", default="2.3")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    phases, watch, clips = Phases(), Watch(), []
    logger = logging.getLogger("ltx2.engine")
    logger.setLevel(logging.INFO)
    logger.addHandler(phases)
    engine_module.SAMPLERS = {name: watch.around(sampler) for name, sampler in samplers.SAMPLERS.items()}
    sample, decode = engine_module.LocalEngine.sample, engine_module.LocalEngine.decode

    def sampled(self, job):
        watch.jobs.append((self, job))
        return sample(self, job)

    def decoded(self, *args):
        clips.append(decode(self, *args))
        return clips[-1]

    engine_module.LocalEngine.sample, engine_module.LocalEngine.decode = sampled, decoded

    path = pack.ROOT / "workflows" / "api" / f"{options.flow}.json"
    with tempfile.TemporaryDirectory() as folder, random_weights("cuda"):
        root = Path(folder)
        chosen = settings(json.loads(path.read_text(encoding="utf-8")), root / "models", options)
        sets = [argument for name, value in chosen.items() for argument in ("--set", f"{name}={value}")]
        start = time.perf_counter()
        code = cli.main(["run", str(path), *sets, "--models", str(root / "models"), "--output", str(root), "--verbose"])
        total = time.perf_counter() - start
        if code != 0:
            raise SystemExit(f"the run failed with exit code {code}")
        assert len(list(root.rglob("*.mp4"))) == 1
        rows = [
            *(Row(f"{name}: time", seconds, "s") for name, seconds, _ in phases.rows),
            *(Row(f"{name}: peak memory", peak, "GiB") for name, _, peak in phases.rows if peak),
            *(Row(f"sampler {n}, a step, median", median(steps), "ms") for n, steps in enumerate(watch.steps, 1)),
            Row("whole run, files to mp4", total, "s"),
            *check(clips),
            Row("operations of all steps that waited for the device", len(watch.waits), "count", "0"),
        ]
        if options.compare:
            rows += compare(watch)
    for message in watch.waits:
        print(message)
    clip = clips[0].frames.shape
    name = f"{options.flow}_{options.version}_{clip[1]}x{clip[2]}x{clip[0]}"
    print(write(options.out, name, rows).read_text())


def check(clips: list) -> list[Row]:
    (clip,) = clips
    frames, waveform = clip.frames, clip.waveform
    latents = round(25 * frames.shape[0] / clip.fps)
    assert waveform.shape[-1] == clip.sample_rate // 100 * (4 * latents - 3), waveform.shape
    finite = bool(frames.isfinite().all()) and bool(waveform.isfinite().all())
    if not finite:
        raise SystemExit("picture or sound is not finite: no figures")
    return [Row("picture and sound finite", float(finite), "1 = yes", "1")]


def compare(watch: Watch) -> list[Row]:
    """A step of the first stage, split and batched, weights already loaded."""
    engine, job = watch.jobs[0]
    rows = []
    for mode in ("split", "batched"):
        watch.steps.clear()
        engine.sample(replace(job, sigmas=job.sigmas[:4], evaluation=mode))
        rows.append(Row(f"stage 1, a step, {mode} passes", median(watch.steps[0][1:]), "ms"))
    return rows


if __name__ == "__main__":
    main()
