"""From Run until something is seen, at full size: to the first encoded prompt, to the first denoised step, and warm-up.

python benchmarks/bench_first_step.py

A checkpoint with all networks, a Gemma 3 12B folder and a rank-384 LoRA are written with random weights and read from
the page cache. "overlapped" reads them in the background from the moment when the loader node runs, the LoRA with the
transformer; "one after the other" reads each when it is needed. Results of both must be equal bit by bit. The first run
of the process finds no compiled kernels, the others find them. The text encoder's files go to --text-folder, for machines
where one disk does not hold everything.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core import engine as engine_module
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.engine import LocalEngine
from ltx2_engine.ltx2_core.handles import ModelHandle, open_engine
from ltx2_engine.ltx2_core.host import use_host
from ltx2_engine.ltx2_core.job import SampleJob
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.networks import NETWORKS
from ltx2_engine.ltx2_core.sampling.choice import SamplerChoice
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.ltx2_core.transformer.model import Transformer
from random_files import write_gemma, write_lora, write_transformer
from report import Row, write
from temporary import temporary_folder
from timing import default_device, settle

CLIP = ClipShape(121, 512, 768, 24.0)
WARM_UP, FIRST_FORWARD = "warm-up by itself", "first forward after load, with warm-up"
BARS = {FIRST_FORWARD: "<= 3"}


def run(spec: ModelSpec, lora: Path, *, overlap: bool) -> tuple[dict[str, float], torch.Tensor]:
    """Seconds from Run to each event and of what comes between, and the latent of one step."""
    settle(torch.device(spec.device))
    start = time.perf_counter()
    handle = ModelHandle(spec, open_engine(spec))
    transformer = handle.engine._networks["transformer"]
    if overlap:
        handle.start()
    else:
        transformer.overlap = False
    model = handle.with_lora(lora, 1.0)
    if not overlap:
        model.engine.start = lambda: None
    seconds = {}
    context = model.engine.encode("a bell rings")
    settle(torch.device(spec.device))
    seconds["first prompt encoded"] = time.perf_counter() - start
    off = StreamGuidance()
    job = SampleJob(AVLatent(CLIP), context, None, AV(off, off), (1.0, 0.9), SamplerChoice("euler"), 3)
    parts: Counter[str] = Counter()
    ready = []

    def use(*args: Any, use: Callable[..., Any] = transformer.use, **options: Any) -> Any:
        module = use(*args, **options)
        ready.append(time.perf_counter())
        return module

    with (
        patch.object(transformer, "use", use),
        patch.object(Transformer, "warm_up", clocked(Transformer.warm_up, WARM_UP, parts)),
        patch.object(engine_module, "warm_up", clocked(engine_module.warm_up, WARM_UP, parts)),
    ):
        first = model.engine.sample(job)
    end = time.perf_counter()
    seconds["first step denoised"] = end - start
    seconds[WARM_UP] = parts[WARM_UP]
    seconds[FIRST_FORWARD] = end - ready[-1]
    again = time.perf_counter()
    model.engine.sample(job)
    seconds["a step, warm"] = time.perf_counter() - again
    return seconds, first.latents.video


def clocked(work: Callable[..., Any], name: str, seconds: Counter[str]) -> Callable[..., Any]:
    """The function, whose time is added to ``seconds[name]``, that of the device included."""

    def timed(*args: Any, **options: Any) -> Any:
        settle(default_device())
        start = time.perf_counter()
        result = work(*args, **options)
        settle(default_device())
        seconds[name] += time.perf_counter() - start
        return result

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", default="2.3")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--layers", type=int, help="fewer blocks and text layers, for a small machine")
    parser.add_argument("--folder", type=Path, help="where the files go; by default a temporary folder")
    parser.add_argument("--text-folder", type=Path, help="where the text encoder's files go")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    config = released_config(options.version)
    if options.layers:
        config["transformer"]["num_layers"] = options.layers
    text_layers = options.layers or 48
    model = ModelConfig.from_config(config, text_layers + 1, ())
    with (
        temporary_folder(options.folder) as folder,
        temporary_folder(options.text_folder) as text,
        temporary_folder() as kernels,
        patch.dict(os.environ, {"TRITON_CACHE_DIR": str(kernels)}),
        use_host(StandaloneHost(progress="quiet")),
        torch.inference_mode(),
    ):
        checkpoint, lora = folder / "model.safetensors", folder / "lora.safetensors"
        write_transformer(checkpoint, config, model, options.version, NETWORKS)
        write_lora(lora, model, 384)
        write_gemma(text, text_layers)
        spec = ModelSpec.of(checkpoint, text, dtype="bfloat16", device=str(default_device()))
        rows = measure(spec, lora, options.repeat)
    print(write(options.out, f"first_step_{options.version}", rows).read_text())


def measure(spec: ModelSpec, lora: Path, repeat: int) -> list[Row]:
    # touches memory and the page cache too, so what it takes to read the files is no figure
    cold, latent = run(spec, lora, overlap=True)
    rows = [
        Row(f"{WARM_UP}, kernel caches empty", cold[WARM_UP], "s"),
        Row(f"{FIRST_FORWARD}, kernel caches empty", cold[FIRST_FORWARD], "s", "<= 30"),
    ]
    latents = [latent]
    for name, overlap in (("overlapped", True), ("one after the other", False)):
        runs = []
        for _ in range(repeat):
            gc.collect()
            torch.cuda.empty_cache()
            assert not any(isinstance(thing, LocalEngine) for thing in gc.get_objects()), "an engine is left"
            seconds, latent = run(spec, lora, overlap=overlap)
            runs.append(seconds)
            latents.append(latent)
        rows += [
            Row(f"{event}, {name}", median(one[event] for one in runs), "s", BARS.get(event, "")) for event in runs[0]
        ]
    if not all(torch.equal(latent, latents[0]) for latent in latents):
        raise SystemExit("overlap changes bits: no figures")
    return rows


if __name__ == "__main__":
    main()
