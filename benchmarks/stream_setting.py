"""What bench_stream.py runs: the model, clips and limits, at full size or tiny, and how outputs are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.tiny import tiny_config, write_tiny_set
from own_model import Draw, Output, drawing
from random_model import write_full_size
from report import Row
from timing import GIB

CHECK = "1 = yes"


@dataclass(frozen=True)
class Setting:
    """What is run. small, large, larger: clips. budget: bytes of weights and slots of the streamed model.

    limits: of the engine, in GiB, the last one with room for all weights. stg_block: for guided steps.
    """

    device: torch.device
    config: dict[str, Any]
    small: ClipShape
    large: ClipShape
    larger: ClipShape
    budget: int
    limits: Sequence[float]
    stg_block: int
    rounds: int
    warm: int
    write_files: Callable[[Path], tuple[Path, Path]]

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.from_config(self.config, 49, ())

    @property
    def guided(self) -> StreamGuidance:
        return StreamGuidance(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(self.stg_block,))

    @property
    def random(self) -> Draw:
        return drawing(self.device)


def full_size(layers: int | None, rounds: int) -> Setting:
    config = released_config("2.3")
    config["transformer"]["num_layers"] = layers or config["transformer"]["num_layers"]

    def write_files(root: Path) -> tuple[Path, Path]:
        checkpoint, encoder = write_full_size(root, "2.3", config)
        return root / "checkpoints" / checkpoint, root / "text_encoders" / encoder

    return Setting(
        torch.device("cuda:0"),
        config,
        small=ClipShape(121, 512, 768, 24.0),
        large=ClipShape(121, 768, 1280, 24.0),
        larger=ClipShape(121, 1088, 1920, 24.0),
        budget=12 * GIB,
        limits=(16, 24, 48),
        stg_block=min(28, config["transformer"]["num_layers"] - 1),
        rounds=rounds,
        warm=2,
        write_files=write_files,
    )


def tiny(layers: int | None) -> Setting:
    config = tiny_config("2.3")
    config["transformer"]["num_layers"] = layers or 6

    def write_files(root: Path) -> tuple[Path, Path]:
        checkpoint, encoder, *_ = write_tiny_set(root, "2.3")
        return checkpoint, encoder

    return Setting(
        torch.device("cuda:0" if torch.cuda.is_available() else "cpu"),
        config,
        small=ClipShape(9, 64, 96, 24.0),
        large=ClipShape(17, 64, 96, 24.0),
        larger=ClipShape(17, 96, 128, 24.0),
        budget=0,
        limits=(0.5, 48),
        stg_block=1,
        rounds=2,
        warm=1,
        write_files=write_files,
    )


def named(clip: ClipShape) -> str:
    return f"{clip.height}x{clip.width}x{clip.frames}"


def same_bits(what: str, given: Sequence[Sequence[Output]]) -> Row:
    """Whether all outputs of all runs are the same numbers."""
    first, *others = (output for outputs in given for output in outputs)
    finite = all(part.isfinite().all() for part in first)
    equal = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return Row(f"{what}: finite, streamed and resident equal bit for bit", float(finite and equal), CHECK, "1")
