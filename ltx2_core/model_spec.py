"""What identifies a loaded model. Torch-free, so that nodes can make one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

DTYPES = ("auto", "bfloat16", "float32")

# path, size and time of change: a replaced file is another file
Identity = tuple[str, int, int]


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA and how strongly it counts; 1 is what it was trained for."""

    path: Path
    strength: float
    identity: Identity


@dataclass(frozen=True)
class ModelSpec:
    """One model on one device.

    checkpoint: the LTX-2 file. text_encoder: the Gemma folder. dtype: ``bfloat16`` or ``float32``.
    identity: of every file. loras: added to the transformer in this order.
    """

    checkpoint: Path
    text_encoder: Path
    dtype: str
    device: str
    identity: tuple[Identity, ...]
    loras: tuple[LoraSpec, ...] = ()

    @classmethod
    def of(cls, checkpoint: Path, text_encoder: Path, *, dtype: str, device: str) -> ModelSpec:
        """The spec of these files as they are now. ``auto`` is bfloat16 on a GPU and float32 on the CPU.

        Raises ValueError for an unknown dtype, OSError for a file that is not there.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not known; choose {', '.join(DTYPES)}")
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        files = [checkpoint, *sorted(p for p in text_encoder.iterdir() if p.suffix in (".safetensors", ".json"))]
        return cls(checkpoint, text_encoder, dtype, device, tuple(_identity(path) for path in files))

    def with_lora(self, path: Path, strength: float) -> ModelSpec:
        """This model with one LoRA more. Raises ValueError for a strength that is not a number from -10 to 10."""
        if not (math.isfinite(strength) and abs(strength) <= 10):
            raise ValueError(f"{path.name}: a LoRA's strength must be a number from -10 to 10, found {strength}")
        return replace(self, loras=(*self.loras, LoraSpec(path, strength, _identity(path))))

    @property
    def base(self) -> ModelSpec:
        """The model without its LoRAs."""
        return replace(self, loras=())


def _identity(path: Path) -> Identity:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
