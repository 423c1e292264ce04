"""The host without ComfyUI: files from given folders, progress in a terminal, memory by what the devices say."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .host import HostOutOfMemory, Interrupted, PreviewSpec, Progress, Resident, SavedFile
from .paths import (
    KIND_FOLDERS,
    PathError,
    check_model_file,
    check_relative,
    check_text_encoder,
    find_files,
    find_inside,
    is_inside,
    model_suffixes,
    read_extra_model_paths,
    text_encoder_names,
)

_LOG = logging.getLogger("ltx2")

Event = Callable[..., None]


class StandaloneHost:
    """Host of the command line and of the tests.

    model_roots: folders laid out as ComfyUI's ``models`` folder. progress: ``bar`` (tqdm on stderr), ``json``
    (``on_event("progress", node=..., completed=..., total=...)``, at most ten a second) or ``quiet``.
    """

    name = "standalone"

    def __init__(
        self,
        model_roots: Sequence[Path | str] = (),
        input_dir: Path | str = "input",
        output_dir: Path | str = "output",
        progress: str = "bar",
        extra_model_paths: Path | str | None = None,
        on_event: Event | None = None,
    ):
        if progress not in ("bar", "json", "quiet"):
            raise ValueError(f"progress must be 'bar', 'json' or 'quiet', found {progress!r}")
        if progress == "json" and on_event is None:
            raise ValueError("progress 'json' needs on_event, which receives the events")
        self.input_dir, self.output_dir = Path(input_dir), Path(output_dir)
        self.metadata: dict[str, Any] | None = None
        self.current_node: str | None = None
        self._progress, self._on_event = progress, on_event
        self._stop = threading.Event()
        self._temp: tempfile.TemporaryDirectory[str] | None = None
        self._residents: list[Resident] = []
        self._folders = {
            kind: [Path(root) / folder for root in model_roots for folder in folders]
            for kind, folders in KIND_FOLDERS.items()
        }
        if extra_model_paths is not None:
            self._add_folders(read_extra_model_paths(Path(extra_model_paths)))

    def _add_folders(self, entries: Sequence[tuple[str, Path, bool]]) -> None:
        for kind, folder, is_default in entries:
            folders = [known for known in self._folders[kind] if known != folder]
            self._folders[kind] = [folder, *folders] if is_default else [*folders, folder]

    @property
    def log(self) -> logging.Logger:
        return _LOG

    # progress and control

    def progress(self, total: int, label: str, node_id: str | None = None) -> Progress:
        """A display of ``total`` steps. ``node_id`` defaults to the node that is running."""
        if self._progress == "bar":
            return _Bar(self, total, label)
        if self._progress == "json" and self._on_event is not None:
            return _Events(self, total, node_id or self.current_node, self._on_event)
        return _Quiet(self, total)

    def interrupt(self) -> None:
        """Ask the run to stop. Safe in signal handlers and other threads."""
        self._stop.set()

    def interrupted(self) -> bool:
        return self._stop.is_set()

    def check_interrupt(self) -> None:
        """Raise ``Interrupted`` once if a stop was asked for."""
        if self._stop.is_set():
            self._stop.clear()
            raise Interrupted("interrupted by the user")

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM inside the block asks the run to stop, the second one kills the process."""

        def stop(number: int, frame: object) -> None:
            self.interrupt()
            signal.signal(number, signal.SIG_DFL)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def inference_scope(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        return torch.inference_mode()

    # paths

    def _allowed(self) -> list[Path]:
        return [folder for folders in self._folders.values() for folder in folders]

    def _kind(self, kind: str) -> list[Path]:
        if kind not in self._folders:
            raise ValueError(f"no model folder is called {kind!r}; there is {', '.join(self._folders)}")
        return self._folders[kind]

    def list_models(self, kind: str) -> list[str]:
        """Relative names of the weight files of ``kind``, sub-folders included."""
        return sorted(find_files(self._kind(kind), self._allowed(), model_suffixes(kind)), key=str.casefold)

    def list_text_encoders(self) -> list[str]:
        """Relative names of the text encoder folders, and of the text encoder files that lie in none."""
        names = text_encoder_names(self.list_models("text_encoders"), self._kind("text_encoders"))
        return sorted(names, key=str.casefold)

    def resolve_model(self, kind: str, name: str) -> Path:
        """The weight file ``name``. Raises ``PathError`` when it is absent, of another type, or out of bounds."""
        path = find_inside(self._kind(kind), self._allowed(), name, f"{kind} file", self.list_models(kind))
        return check_model_file(path, kind, name)

    def resolve_text_encoder(self, name: str) -> Path:
        """The text encoder folder or file ``name``. Raises ``PathError`` as ``resolve_model`` does."""
        folders = self._kind("text_encoders")
        path = find_inside(folders, self._allowed(), name, "text encoder", self.list_text_encoders())
        return check_text_encoder(path, name)

    def input_path(self, name: str) -> Path:
        """The existing file ``name`` of the input folder; ``name [output]`` and ``name [temp]`` as in ComfyUI."""
        folder = self.input_dir
        if isinstance(name, str):
            for mark, place in (("input", self.input_dir), ("output", self.output_dir), ("temp", None)):
                if name.endswith(f" [{mark}]"):
                    name, folder = name[: -len(mark) - 3], place or self.temp_dir()
        path = find_inside([folder], [folder], name, "input file", self.list_inputs() if folder.is_dir() else [])
        if not path.is_file():
            raise PathError(f"input file {name!r} is a folder")
        return path

    def list_inputs(self) -> list[str]:
        """Names of the files directly in the input folder."""
        if not self.input_dir.is_dir():
            return []
        return sorted(entry.name for entry in self.input_dir.iterdir() if entry.is_file())

    def save_path(self, prefix: str, ext: str, width: int = 0, height: int = 0) -> SavedFile:
        """The next free name ``{prefix}_{counter:05}_.{ext}`` below the output folder; makes its folder.

        ``%width% %height% %year% %month% %day% %hour% %minute% %second%`` in ``prefix`` are replaced, as in ComfyUI.
        """
        if not re.fullmatch(r"[A-Za-z0-9]{1,8}", ext):
            raise PathError(f"file extension {ext!r} must be 1 to 8 letters or digits")
        name = check_relative(_fill_in(prefix, width, height), "file name prefix")
        subfolder, _, filename = name.rpartition("/")
        folder = self.output_dir / subfolder
        if not is_inside(self.output_dir, folder):
            raise PathError(f"file name prefix {prefix!r} leaves the output folder {self.output_dir}")
        folder.mkdir(parents=True, exist_ok=True)
        file = f"{filename}_{_next_counter(folder, filename):05}_.{ext}"
        return SavedFile(folder / file, file, subfolder)

    def temp_dir(self) -> Path:
        """A private folder that is removed with the host."""
        if self._temp is None:
            self._temp = tempfile.TemporaryDirectory(prefix="ltx2-")
        return Path(self._temp.name)

    def save_metadata(self) -> dict[str, Any] | None:
        """Prompt and workflow to embed into saved files; ``None`` when there is none or embedding is off."""
        return self.metadata

    # devices and memory

    def wants_preview(self, channels: int) -> PreviewSpec | None:
        """A terminal shows no pictures."""
        return None

    def compute_devices(self) -> list[str]:
        try:
            import torch
        except ImportError:  # tools that only list the nodes run without torch
            return ["cpu"]
        return [*(f"cuda:{index}" for index in range(torch.cuda.device_count())), "cpu"]

    def default_device(self) -> str:
        return self.compute_devices()[0]

    def offload_device(self) -> str:
        return "cpu"

    def intermediate_device(self) -> str:
        return "cpu"

    def free_bytes(self, device: str) -> int | None:
        """Bytes that can be allocated on ``device``; ``None`` when the system does not say."""
        if device.startswith("cuda"):
            import torch

            free, _ = torch.cuda.mem_get_info(device)
            return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return _available_memory() if device == "cpu" else None

    def make_room(self, bytes_by_device: dict[str, int]) -> None:
        """Release residents, least recently used first, until each device has the bytes or nothing is left."""
        for device, wanted in bytes_by_device.items():
            self._release(device, wanted, keep=None)

    def admit(self, resident: Resident, device: str, weight_bytes: int, activation_bytes: int) -> None:
        """Make room for a resident's weights and work space on ``device``, before it loads them.

        weight_bytes: what it holds there when complete, what is loaded already included. Raises ``HostOutOfMemory``.
        """
        held = resident.bytes_on(device)
        wanted = max(weight_bytes - held, 0) + activation_bytes
        released = self._release(device, wanted, keep=resident)
        free = self.free_bytes(device)
        if free is not None and free < wanted:
            raise HostOutOfMemory(
                _shortage(resident.label, device, held, weight_bytes, activation_bytes, free, released)
                + self._ways_out(device, weight_bytes, activation_bytes, free + held)
            )
        self.retire(resident)
        self._residents.append(resident)

    def retire(self, resident: Resident) -> None:
        """Forget a resident that gave its memory back."""
        self._residents = [other for other in self._residents if other is not resident]

    def _release(self, device: str, wanted: int, keep: Resident | None) -> list[str]:
        released = []
        for other in list(self._residents):
            free = self.free_bytes(device)
            if free is None or free >= wanted:
                break
            if other is keep or other.bytes_on(device) == 0:
                continue
            freed = other.release(device, wanted - free)
            self.log.info("%s released %s on %s", other.label, _size(freed), device)
            released.append(f"{other.label} ({_size(freed)})")
        if released and device.startswith("cuda"):
            import torch

            with torch.cuda.device(device):
                torch.cuda.empty_cache()
        return released

    def _ways_out(self, device: str, weight_bytes: int, activation_bytes: int, room: int) -> str:
        others = [(d, self.free_bytes(d)) for d in self.compute_devices() if d not in (device, "cpu")]
        roomy = "; ".join(f"{d} has {_size(free)} free" for d, free in others if free is not None)
        smaller = f"fewer frames or a smaller picture (work space is {_size(activation_bytes)})"
        ways = [
            f"weights in fp8 (about half of {_size(weight_bytes)})",
            "more GPUs, or another device" + (f" ({roomy})" if roomy else ""),
        ]
        ways = [smaller, *ways] if weight_bytes <= room else [*ways, smaller]
        return " Ways out, cheapest first: " + "; ".join(f"{number}. {way}" for number, way in enumerate(ways, 1))


def _shortage(label: str, device: str, held: int, weights: int, activation: int, free: int, released: list[str]) -> str:
    after = f" after releasing {', '.join(released)}" if released else ""
    return (
        f"{label} does not fit on {device}: it needs {_size(weights)} for weights ({_size(held)} are loaded) "
        f"and {_size(activation)} for work; {_size(free)} are free{after}."
    )


def _fill_in(prefix: str, width: int, height: int) -> str:
    if not isinstance(prefix, str) or "%" not in prefix:
        return prefix
    now = time.localtime()
    values = {"width": str(width), "height": str(height), "year": str(now.tm_year)}
    values |= {key: f"{getattr(now, 'tm_' + field):02}" for key, field in _CLOCK.items()}
    return re.sub(r"%(\w+)%", lambda match: values.get(match[1], match[0]), prefix)


_CLOCK = {"month": "mon", "day": "mday", "hour": "hour", "minute": "min", "second": "sec"}


def _next_counter(folder: Path, filename: str) -> int:
    start = os.path.normcase(filename + "_")
    rests = (e.name[len(start) :] for e in folder.iterdir() if os.path.normcase(e.name).startswith(start))
    numbers = (re.match(r"[0-9]{1,12}(?=[_.]|$)", rest) for rest in rests)
    return max((int(number[0]) for number in numbers if number), default=0) + 1


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


class _Quiet:
    """Counts and polls; the other displays add how it is shown."""

    def __init__(self, host: StandaloneHost, total: int):
        self._host, self._total, self._value = host, total, 0

    def __enter__(self) -> _Quiet:
        self._show()
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def step(self, n: int = 1, picture: Any = None) -> None:
        self.to(self._value + n)

    def to(self, value: int, total: int | None = None) -> None:
        self._value, self._total = value, self._total if total is None else total
        self._show()
        self._host.check_interrupt()

    def _show(self) -> None:
        """Nothing is shown."""

    def _close(self) -> None:
        """Nothing to close."""


class _Bar(_Quiet):
    def __init__(self, host: StandaloneHost, total: int, label: str):
        super().__init__(host, total)
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=label, file=sys.stderr, dynamic_ncols=True)

    def _show(self) -> None:
        self._bar.total = self._total
        self._bar.update(self._value - self._bar.n)

    def _close(self) -> None:
        self._bar.close()


class _Events(_Quiet):
    def __init__(self, host: StandaloneHost, total: int, node_id: str | None, on_event: Event):
        super().__init__(host, total)
        self._node_id, self._on_event = node_id, on_event
        self._sent, self._when = (-1, -1), float("-inf")

    def _show(self) -> None:
        state, now = (self._value, self._total), time.monotonic()
        if state == self._sent or (now - self._when < 0.1 and 0 < self._value < self._total):
            return
        self._sent, self._when = state, now
        self._on_event("progress", node=self._node_id, completed=self._value, total=self._total)
