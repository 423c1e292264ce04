"""What identifies a loaded model. Torch-free, so that nodes can make one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class ModelSpec:
    """One model on one device.

    checkpoint: the LTX-2 file. text_encoder: the Gemma folder. dtype: ``bfloat16`` or ``float32``.
    identity: size and time of change of every file, so that a replaced file is another model.
    """

    checkpoint: Path
    text_encoder: Path
    dtype: str
    device: str
    identity: tuple[tuple[str, int, int], ...]

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
        identity = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
        return cls(checkpoint, text_encoder, dtype, device, identity)
