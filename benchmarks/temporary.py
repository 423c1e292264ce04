"""Where large files of a benchmark lie while it runs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary_folder(within: Path | None = None) -> Iterator[Path]:
    """A folder that goes at the end, inside another one, which is made where it is missing, or where the system has its."""
    if within is not None:
        within.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=within) as name:
        yield Path(name)
