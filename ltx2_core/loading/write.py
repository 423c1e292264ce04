"""Writing checkpoints in the released layout."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import SAFETENSORS_SUFFIXES


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name in the same folder, then give it its name.

    A file of that name is replaced; whatever goes wrong, no half-written file bears it. Raises ValueError for a name
    that does not end in .safetensors or .sft.
    """
    path = Path(path)
    if path.suffix.lower() not in SAFETENSORS_SUFFIXES:
        raise ValueError(f"{path}: a checkpoint's name must end in {' or '.join(SAFETENSORS_SUFFIXES)}")
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, dict(metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
