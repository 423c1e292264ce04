"""What the engine asks of the program around it: progress, interrupts, files, devices, memory.

``Host`` is the contract; `standalone.py` implements it without ComfyUI, `nodes/host.py` with it. Nodes and core call ``host()``.
Methods belong to the node's thread, except ``interrupted``, ``inference_scope`` and ``log``. A helper thread starts
with an empty context, so it is handed the host object and does not call ``host()`` itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_LOG = logging.getLogger("ltx2")


class Interrupted(BaseException):
    """The user asked to stop. Not an ``Exception``, so that no recovery code swallows it."""


class HostOutOfMemory(RuntimeError):
    """The weights and the work space do not fit on a device, whatever is released."""


class Progress(Protocol):
    """A progress display, used as a context manager. Both calls raise when the user interrupts.

    picture: [rows, columns, 3] uint8, a preview to show beside the progress where the host shows one.
    """

    def __enter__(self) -> Progress: ...
    def __exit__(self, *exc: object) -> None: ...
    def step(self, n: int = 1, picture: Any = None) -> None: ...
    def to(self, value: int, total: int | None = None) -> None: ...


@dataclass(frozen=True)
class PreviewSpec:
    """How a latent becomes a rough picture: colours in -1..1 = latent @ factors + bias.

    factors: one (red, green, blue) for each latent channel. bias: red, green, blue.
    """

    factors: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]


class Resident(Protocol):
    """Something that occupies device memory and can give it back."""

    label: str

    def bytes_on(self, device: str) -> int:
        """Bytes of weights that it holds on ``device`` now."""

    def release(self, device: str, wanted: int | None) -> int:
        """Free at least ``wanted`` bytes on ``device`` if possible (``None``: all). Returns the bytes freed."""


@dataclass(frozen=True)
class SavedFile:
    """Where a result goes. ``type`` is ComfyUI's folder name: output, temp or input."""

    path: Path
    filename: str
    subfolder: str
    type: str = "output"

    def ui(self) -> dict[str, str]:
        """The entry that ComfyUI's interface expects in a node's ``ui`` result."""
        return {"filename": self.filename, "subfolder": self.subfolder, "type": self.type}


class Host(Protocol):
    """The program around the engine. Devices are strings such as ``cuda:0`` and ``cpu``."""

    name: str

    @property
    def log(self) -> logging.Logger: ...
    def progress(self, total: int, label: str, node_id: str | None = None) -> Progress: ...
    def wants_preview(self, channels: int) -> PreviewSpec | None: ...
    def check_interrupt(self) -> None: ...
    def interrupted(self) -> bool: ...
    def inference_scope(self) -> contextlib.AbstractContextManager[Any]: ...
    def list_models(self, kind: str) -> list[str]: ...
    def list_text_encoders(self) -> list[str]: ...
    def resolve_model(self, kind: str, name: str) -> Path: ...
    def resolve_text_encoder(self, name: str) -> Path: ...
    def input_path(self, name: str) -> Path: ...
    def save_path(self, prefix: str, ext: str, width: int = 0, height: int = 0) -> SavedFile: ...
    def temp_dir(self) -> Path: ...
    def save_metadata(self) -> dict[str, Any] | None: ...
    def compute_devices(self) -> list[str]: ...
    def default_device(self) -> str: ...
    def offload_device(self) -> str: ...
    def intermediate_device(self) -> str: ...
    def free_bytes(self, device: str) -> int | None: ...
    def make_room(self, bytes_by_device: dict[str, int]) -> None: ...
    def admit(self, resident: Resident, device: str, weight_bytes: int, activation_bytes: int) -> None: ...
    def retire(self, resident: Resident) -> None: ...


_current: ContextVar[Host | None] = ContextVar("ltx2_host", default=None)
_default: Host | None = None


def host() -> Host:
    """The host of this context: the innermost ``use_host``, else the process default."""
    global _default
    chosen = _current.get()
    if chosen is not None:
        return chosen
    if _default is None:
        from .standalone import StandaloneHost

        _default = StandaloneHost(progress="quiet")
    return _default


def set_default_host(chosen: Host) -> None:
    """Make ``chosen`` the host of every context that has none of its own. ComfyUI's adapter calls this once."""
    global _default
    _default = chosen


@contextlib.contextmanager
def use_host(chosen: Host) -> Iterator[Host]:
    """``host()`` returns ``chosen`` inside the block."""
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)
