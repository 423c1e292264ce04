"""Decoding video at full size: time and memory for every length of piece, to the device and to frames in host memory.

python benchmarks/bench_pieces.py
python benchmarks/bench_pieces.py --size 1920 1088
python benchmarks/bench_pieces.py --small    (a tiny picture, on the CPU too: a trial of the script in seconds)

Weights are random. first: the first decode in pieces of that length, in which cuDNN plans for new shapes. device: pixels
stay on the device. host: frames in host memory, as the node gives them. peak: with the weights. planned: what
``plan_decode`` expects beside the weights, for the decode to host memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.config.video_vae import VideoVAEConfig
from ltx2_engine.ltx2_core.frames import deliver
from ltx2_engine.ltx2_core.vae import tiling
from ltx2_engine.ltx2_core.vae.tiling import TilePlan, plan_decode
from ltx2_engine.ltx2_core.vae.video_decoder import VideoDecoder
from report import Row, write

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", choices=("2.0", "2.3"), default="2.3")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 768), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="let cuDNN try its algorithms (cudnn.benchmark)")
    parser.add_argument("--small", action="store_true", help="a tiny picture; nothing is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.small:
        options.size, options.frames, options.rounds = (64, 64), 17, 1
    torch.backends.cudnn.benchmark = options.tune
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    config = VideoVAEConfig.from_config(released_config(options.label))
    width, height = options.size
    grid = ((options.frames - 1) // 8 + 1, height // 32, width // 32)
    shape = (1, config.latent_channels, *grid)
    rows = []
    with torch.inference_mode():
        decoder = _decoder(config, device)
        latents = torch.randn(shape, device=device, dtype=torch.bfloat16)
        auto = plan_decode(config, shape, 2, 1 << 50)
        for plan in (*(TilePlan(chunk) for chunk in sorted(tiling.CHUNK_SIZES)), TilePlan()):
            for row in _measured(decoder, latents, plan, options):
                chosen = " (the planner's choice)" if plan == auto else ""
                print(f"{row.id}: {row.value:.4g} {row.unit}{chosen}", flush=True)
                rows.append(row)
    print(f"planned for {auto}: {auto.work_bytes / GIB:.2f} GiB")
    if not options.small:
        print(write(options.out, f"pieces_{options.label}_{height}x{width}x{options.frames}", rows))


def _decoder(config: VideoVAEConfig, device: torch.device) -> VideoDecoder:
    with torch.device("meta"):
        decoder = VideoDecoder(config)
    decoder = decoder.to_empty(device=device).to(torch.bfloat16)
    for tensor in decoder.state_dict().values():
        tensor.normal_(std=(1.5 / tensor[0].numel() ** 0.5) if tensor.ndim > 1 else 0.2)
    return decoder


def _measured(decoder: VideoDecoder, latents: torch.Tensor, plan: TilePlan, options: argparse.Namespace) -> list[Row]:
    width, height = options.size
    on_gpu = latents.device.type == "cuda"

    def to_device() -> None:
        for _ in tiling.decode(decoder, latents, plan):
            pass

    def to_host() -> None:
        frames = torch.empty(1, options.frames, height, width, 3)
        deliver(tiling.decode(decoder, latents, plan), frames, latents.device)

    rows = []
    for name, run in (("device", to_device), ("host", to_host)):
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        first, *rest = (_seconds(run) for _ in range(options.rounds + 1))
        if name == "device":
            rows.append(Row(f"{plan}: first", first * 1000, "ms"))
        rows.append(Row(f"{plan}: {name}", statistics.median(rest) * 1000, "ms"))
        if on_gpu:
            rows.append(Row(f"{plan}: {name}, peak", torch.cuda.max_memory_allocated() / GIB, "GiB"))
            rows.append(Row(f"{plan}: {name}, reserved", torch.cuda.max_memory_reserved() / GIB, "GiB"))
    return rows


def _seconds(run: Callable[[], None]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
