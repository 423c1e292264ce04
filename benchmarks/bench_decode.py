"""Decoding at full size: the video VAE of LTX-2.3 whole, streamed and tiled, beside diffusers, and its sound.

python benchmarks/bench_decode.py
python benchmarks/bench_decode.py --tiny    (a tiny VAE, on the CPU too: a trial of the script; nothing is written)

Weights are random, N(0, 0.02), and so are latents. The plan of the stream is the engine's for half of the memory that the
whole clip takes. Ours and diffusers take turns on the device, ours comes again at the end. Peak memory is counted beside
the weights. There are no figures where a picture is not finite, where the stream differs from the whole clip, or where
either differs from plain torch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import own_model
import pack
import torch
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.networks import build_on_meta
from ltx2_engine.ltx2_core.testing import cosine, relative_error
from ltx2_engine.ltx2_core.tiny import tiny_config
from ltx2_engine.ltx2_core.vae.tiling import TilePlan, decode, plan_decode
from own_model import DTYPE, drawing, fill
from report import Row, write
from shapes import LARGE, MIDDLE, TINY, Shape
from step_check import WrongResult, lowest
from step_peers import installed
from timing import GIB, Measured, Stopwatch, allocated, clean, default_device
from torch import Tensor

STREAM_SHARE = 0.5  # of the memory of a whole clip
# of tests/core/vae, in float32
TOLERANCE = 1e-5
# in bfloat16, where a convolution of fewer frames may be another algorithm
LEAST_COSINE = 0.9999
# what the engine's plan takes of the memory that is free
PLANNED_SHARE = 0.8


@dataclass(frozen=True)
class Setting:
    """What is run. check: of the comparison in float32, whose stream has several pieces."""

    device: torch.device
    config: dict[str, Any]
    shapes: tuple[Shape, ...]
    check: Shape
    watch: Stopwatch

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.from_config(self.config, 49, ())

    def latents(self, shape: Shape, dtype: torch.dtype = DTYPE) -> Tensor:
        return drawing(self.device, dtype)(1, self.model.video_vae.latent_channels, *shape.clip.grid)


def plans(setting: Setting, shape: Shape) -> dict[str, TilePlan]:
    """Whole, streamed within half of that memory, and cut into tiles as well."""
    vae, latents = setting.model.video_vae, tuple(setting.latents(shape).shape)
    whole = plan_decode(vae, latents, DTYPE.itemsize, None, "none")
    free = int(whole.work_bytes * STREAM_SHARE / PLANNED_SHARE)
    return {
        "whole": whole,
        "streamed": plan_decode(vae, latents, DTYPE.itemsize, free, "temporal"),
        "tiled": plan_decode(vae, latents, DTYPE.itemsize, free, "spatial"),
    }


def check(setting: Setting) -> list[Row]:
    """Rows of the comparison of stream and whole clip in float32. Raises WrongResult."""
    decoder = fill(build_on_meta("video_decoder", setting.model), setting.device, torch.float32)
    z = setting.latents(setting.check, torch.float32)
    # convolutions in float32 may else use fewer bits
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        error = relative_error(joined(decoder, z, plans(setting, setting.check)["streamed"]), decoder(z))
    row = Row(f"{setting.check}, float32: streamed to whole, relative difference", error, "1", f"<= {TOLERANCE}")
    if not error <= TOLERANCE:
        raise WrongResult(f"{row.id}: {error:.2e}, allowed {TOLERANCE:.0e}: no figures")
    return [row]


def compared(setting: Setting, decoder: Any, shape: Shape) -> Iterator[Row]:
    """Rows of the comparison of stream, whole clip and plain torch at this size. Raises WrongResult."""
    z = setting.latents(shape)
    whole = decoder(z)
    refuse_unless_finite(f"{shape}: ours whole", whole)
    streamed = joined(decoder, z, plans(setting, shape)["streamed"])
    yield _alike(f"{shape}: streamed to whole, cosine", streamed, whole)
    del streamed
    with own_model.plain_torch():
        plain = decoder(z)
    yield _alike(f"{shape}: whole to plain torch, cosine", whole, plain)


def _alike(what: str, got: Tensor, want: Tensor) -> Row:
    # a frame at a time: in float64 a whole clip takes gigabytes
    alike = lowest([cosine(a, b) for a, b in zip(got.unbind(2), want.unbind(2), strict=True)])
    if not alike >= LEAST_COSINE:
        raise WrongResult(f"{what} is {alike:.6f}, at least {LEAST_COSINE}: no figures")
    return Row(f"{what}, worst frame", alike, "1", f">= {LEAST_COSINE}")


def joined(decoder: Any, z: Tensor, plan: TilePlan) -> Tensor:
    return torch.cat(list(decode(decoder, z, plan)), dim=2)


def refuse_unless_finite(what: str, pixels: Tensor) -> None:
    if not bool(pixels.isfinite().all()):
        raise WrongResult(f"{what}: the output is not finite: no figures")


class Results:
    def __init__(self) -> None:
        self.by_shape: dict[Shape, dict[str, list[Measured]]] = {}

    def add(self, shape: Shape, who: str, measured: Measured, note: str = "") -> None:
        self.by_shape.setdefault(shape, {}).setdefault(who, []).append(measured)
        print(f"{shape}: {who}: {measured.median:.1f} ms, {measured.peak / GIB:.2f} GiB {note}", flush=True)

    def rows(self) -> Iterator[Row]:
        for shape, found in self.by_shape.items():
            for who, visits in found.items():
                merged = Measured()
                for visit in visits:
                    merged.add(visit)
                yield from merged.rows(f"{shape}: {who}")
                if len(visits) > 1:
                    yield from (
                        Row(f"{shape}: {who}: time, visit {n}", v.median, "ms") for n, v in enumerate(visits, 1)
                    )
            yield from self._ratios(shape, {who: visits[0] for who, visits in found.items()})

    def _ratios(self, shape: Shape, found: dict[str, Measured]) -> Iterator[Row]:
        whole = found["ours whole"]
        for who in ("ours streamed", "ours tiled"):
            one, bar = found[who], f"<= {STREAM_SHARE}" if who == "ours streamed" else ""
            if whole.peak:
                yield Row(f"{shape}: {who} / ours whole: peak memory", one.peak / whole.peak, "1", bar)
            yield Row(f"{shape}: {who} / ours whole: time", one.median / whole.median, "1")
        for kind in ("whole", "tiled"):
            theirs = found.get(f"diffusers {kind}")
            own = [who for who in found if who.startswith("ours")] if theirs else []
            for who in own:
                bar = "<= 1.00" if (shape, who, kind) == (MIDDLE, "ours streamed", "whole") else ""
                yield Row(f"{shape}: {who} / diffusers {kind}: time", found[who].median / theirs.median, "1", bar)
                if theirs.peak:
                    yield Row(f"{shape}: {who} / diffusers {kind}: peak memory", found[who].peak / theirs.peak, "1")


def measure_ours(setting: Setting, results: Results) -> list[Row]:
    """Returns the rows of the comparisons. Raises WrongResult."""
    clean(setting.device)
    decoder = fill(build_on_meta("video_decoder", setting.model), setting.device)
    weights, rows = allocated(setting.device), []
    for shape in setting.shapes:
        rows += compared(setting, decoder, shape)
        for kind, plan in plans(setting, shape).items():
            measured, last = setting.watch.measure(decoding(setting, decoder, shape, plan), weights)
            refuse_unless_finite(f"{shape}: ours {kind}", last)
            results.add(shape, f"ours {kind}", measured, f"({plan})")
    return rows


def decoding(setting: Setting, decoder: Any, shape: Shape, plan: TilePlan) -> Callable[[], Tensor]:
    """Decodes a clip and drops its pieces, as the engine does when they are in host memory; gives the last one."""
    z = setting.latents(shape)

    def run() -> Tensor:
        for chunk in decode(decoder, z, plan):  # noqa: B007
            pass
        return chunk

    return run


def measure_diffusers(setting: Setting, results: Results) -> None:
    from diffusers import AutoencoderKLLTX2Video

    clean(setting.device)
    with torch.device("meta"):
        model = AutoencoderKLLTX2Video(**diffusers_config(setting.config["vae"]))
    vae = fill(model, setting.device).train(False)
    weights = allocated(setting.device)
    for kind in ("whole", "tiled"):
        if kind == "tiled":
            vae.enable_tiling()
        for shape in setting.shapes:
            z = setting.latents(shape)
            measured, pixels = setting.watch.measure(lambda z=z: vae.decode(z, return_dict=False)[0], weights)
            refuse_unless_finite(f"{shape}: diffusers {kind}", pixels)
            results.add(shape, f"diffusers {kind}", measured)
            del pixels


def diffusers_config(own: dict[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' class for a checkpoint's configuration, which is the released one or narrower."""
    path = pack.ROOT / "tests" / "data" / "video_vae_keys.json"
    config = dict(json.loads(path.read_text(encoding="utf-8"))["2.3"]["diffusers_config"])
    narrower = released_config("2.3")["vae"]["decoder_base_channels"] // own["decoder_base_channels"]
    for name in ("block_out_channels", "decoder_block_out_channels"):
        config[name] = [channels // narrower for channels in config[name]]
    if narrower > 1:
        for name in ("layers_per_block", "decoder_layers_per_block"):
            config[name] = [1] * len(config[name])
    return config | {"latent_channels": own["latent_channels"]}


def sound(setting: Setting) -> Iterator[Row]:
    """Latents to a waveform, in float32 as the engine has it."""
    clean(setting.device)
    config = setting.model
    decoder, vocoder = (
        fill(build_on_meta(name, config), setting.device, torch.float32) for name in ("audio_decoder", "vocoder")
    )
    weights = allocated(setting.device)
    count = setting.shapes[0].audio_tokens
    shape = 1, config.audio_vae.latent_channels, count, config.audio_vae.latent_mel_bins
    z = drawing(setting.device, torch.float32)(*shape)
    measured, waveform = setting.watch.measure(lambda: vocoder(decoder(z)), weights)
    refuse_unless_finite("sound", waveform)
    yield from measured.rows(f"sound, {count} latents")


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[MIDDLE, LARGE])
    parser.add_argument("--seconds", type=float, default=4.0, help="of repetitions of each kind")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--name", default="decode_2.3", help="of the result")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    device = default_device()
    watch = Stopwatch(device, options.seconds)
    setting = Setting(device, released_config("2.3"), tuple(options.shapes), Shape(192, 256, 49), watch)
    if options.tiny:
        watch = Stopwatch(device, 0.0, fewest=2)
        setting = Setting(device, tiny_config("2.3"), TINY[1:], TINY[1], watch)
    peers = not options.no_peers and installed("diffusers")
    results = Results()
    with torch.no_grad():
        rows = check(setting)
        rows += measure_ours(setting, results)
        if peers:
            measure_diffusers(setting, results)
            measure_ours(setting, results)
        elif not options.no_peers:
            print("diffusers is not installed: measured without it")
        rows += results.rows()
        rows += sound(setting)
    for row in rows:
        print(f"{row.id}: {row.value:.6g} {row.unit}" + (f" ({row.bar})" if row.bar else ""))
    if not options.tiny:
        print(write(options.out, options.name, rows, ("diffusers",) if peers else ()))
    return rows


if __name__ == "__main__":
    main()
