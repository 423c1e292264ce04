"""Names of files that come from outside: which are allowed, where they lead, and ComfyUI's model folders."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

KIND_FOLDERS = {
    "checkpoints": ("checkpoints",),
    "diffusion_models": ("diffusion_models", "unet"),
    "loras": ("loras",),
    "text_encoders": ("text_encoders", "clip"),
    "vae": ("vae",),
    "latent_upscale_models": ("latent_upscale_models",),
}
LEGACY_KINDS = {"unet": "diffusion_models", "clip": "text_encoders"}
MODEL_SUFFIXES = (".safetensors", ".sft")
GGUF_SUFFIX = ".gguf"
# transformers and text encoders are there as GGUF files too
GGUF_KINDS = ("checkpoints", "diffusion_models", "text_encoders")
MAX_LISTED = 20_000
MAX_WALKED = 20_000
MAX_NAME = 1_024
MAX_PART = 230  # bytes; file systems allow 255, and a counter and an extension follow

_LOG = logging.getLogger("ltx2")


class PathError(ValueError):
    """A file name that does not exist, or that leaves the folders it may name."""


def check_relative(name: str, what: str = "file name") -> str:
    """``name`` when it is a plain relative path with forward slashes; ``PathError`` otherwise."""
    shown = repr(name if not isinstance(name, str) or len(name) <= 100 else name[:100] + "...")
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME:
        raise PathError(f"{what} {shown} must be a non-empty text of at most {MAX_NAME} characters")
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise PathError(f"{what} {shown} holds a control character")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in name):
        raise PathError(f"{what} {shown} is not valid Unicode")
    if "\\" in name:
        raise PathError(f"{what} {shown} holds a backslash; folders are separated by '/'")
    if name.startswith(("/", "~")) or re.match(r"[A-Za-z]:", name) or (os.name == "nt" and ":" in name):
        raise PathError(f"{what} {shown} must be relative to its folder, not absolute")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise PathError(f"{what} {shown} must not hold '..', '.' or empty parts")
    if any(len(part.encode()) > MAX_PART for part in name.split("/")):
        raise PathError(f"{what} {shown} has a part longer than {MAX_PART} bytes")
    return name


def is_inside(folder: Path | str, target: Path | str) -> bool:
    """Whether ``target`` lies in ``folder`` once symbolic links are followed."""
    try:
        root, real = os.path.realpath(folder), os.path.realpath(target)
        return os.path.commonpath((root, real)) == root
    except (ValueError, OSError):
        return False


def find_inside(folders: Sequence[Path], allowed: Sequence[Path], name: str, what: str, listed: Sequence[str]) -> Path:
    """The file or folder ``name`` below the first of ``folders`` that has it.

    Its real path must lie in one of the ``allowed`` folders. ``listed`` are the legal names, for the message.
    """
    check_relative(name, what)
    for folder in folders:
        path = folder / name
        if not os.path.exists(path):
            continue
        if not any(is_inside(root, path) for root in allowed):
            raise PathError(
                f"{what} {name!r} is a link that leaves its folder ({os.path.realpath(path)}); "
                f"copy the file there, or list a model's real folder in extra_model_paths.yaml"
            )
        return path
    raise PathError(f"{what} {name!r} was not found. {_near(name, listed)} Searched: {_join(folders)}")


def _near(name: str, listed: Sequence[str]) -> str:
    if not listed:
        return "There are none."
    close = difflib.get_close_matches(name.lower(), [entry.lower() for entry in listed], n=3, cutoff=0.5)
    matches = [entry for entry in listed if entry.lower() in close][:3]
    if matches:
        return f"Did you mean {' or '.join(map(repr, matches))}?"
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return f"There is {', '.join(map(repr, listed[:8]))}{more}."


def _join(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders)) or "no folder; none is configured (use --models DIR)"


def model_suffixes(kind: str) -> tuple[str, ...]:
    """How the names of weight files of a kind end."""
    return (*MODEL_SUFFIXES, GGUF_SUFFIX) if kind in GGUF_KINDS else MODEL_SUFFIXES


def find_files(folders: Sequence[Path], allowed: Sequence[Path], suffixes: tuple[str, ...]) -> set[str]:
    """Relative names of the files below the folders whose names end so and that lie in ``allowed``.

    Raises PathError for folders that hold more than is listed.
    """
    names: set[str] = set()
    for folder in folders:
        for directory, files in walk_files(folder, allowed):
            found = [directory / name for name in files if name.lower().endswith(suffixes)]
            inside = [p for p in found if not p.is_symlink() or any(is_inside(root, p) for root in allowed)]
            names.update(path.relative_to(folder).as_posix() for path in inside)
            if len(names) > MAX_LISTED:
                raise PathError(f"{folder} holds more than {MAX_LISTED} models; name a smaller folder")
    return names


def text_encoder_names(weights: Iterable[str], folders: Sequence[Path]) -> set[str]:
    """Text encoders among the weight files below the folders.

    A folder with a ``config.json`` stands for the safetensors files in it; every other file stands for itself.
    """
    parents: dict[str, bool] = {"": False}
    names = set()
    for name in weights:
        parent = name.rpartition("/")[0]
        if parent not in parents:
            parents[parent] = any((folder / parent / "config.json").is_file() for folder in folders)
        names.add(parent if parents[parent] and not name.lower().endswith(GGUF_SUFFIX) else name)
    return names


def check_model_file(path: Path, kind: str, name: str) -> Path:
    """``path``, the weight file that ``name`` leads to; PathError when it is a folder or of another type."""
    suffixes = model_suffixes(kind)
    if path.suffix.lower() not in suffixes or not path.is_file():
        raise PathError(f"{kind} file {name!r} is not a file ending in {' or '.join(suffixes)}")
    return path


def check_text_encoder(path: Path, name: str) -> Path:
    """``path``, the folder or weight file that ``name`` leads to; PathError when it is no text encoder of either form."""
    if path.is_dir() and not (path / "config.json").is_file():
        raise PathError(f"text encoder folder {name!r} holds no config.json")
    return path if path.is_dir() else check_model_file(path, "text_encoders", name)


def walk_files(folder: Path, allowed: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
    """(directory, file names) of ``folder`` and below, following links that stay in ``allowed``, each place once."""
    seen: set[str] = set()
    for directory, subfolders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen or not any(is_inside(root, real) for root in allowed):
            subfolders.clear()
            continue
        seen.add(real)
        if len(seen) > MAX_WALKED:
            raise PathError(f"{folder} holds more than {MAX_WALKED} folders; name a smaller folder")
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        yield Path(directory), sorted(files)


def read_extra_model_paths(path: Path) -> list[tuple[str, Path, bool]]:
    """(kind, folder, is_default) of each entry of an ``extra_model_paths.yaml`` for the kinds that the engine reads."""
    import yaml

    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PathError(f"cannot read {path}: {error}") from error
    if not isinstance(sections, Mapping):
        raise PathError(f"{path} must hold named sections, found {type(sections).__name__}")
    entries = []
    for section, values in sections.items():
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise PathError(f"{path}: section {section!r} must be a mapping, found {type(values).__name__}")
        entries += _section_paths(path, str(section), values)
    return entries


def _section_paths(path: Path, section: str, values: Mapping[str, Any]) -> list[tuple[str, Path, bool]]:
    base = path.resolve().parent / os.path.expandvars(os.path.expanduser(str(values.get("base_path", ""))))
    is_default = values.get("is_default", False)
    if not isinstance(is_default, bool):
        raise PathError(f"{path}: {section}.is_default must be true or false, found {is_default!r}")
    entries = []
    for key, lines in values.items():
        kind = LEGACY_KINDS.get(key, key)
        if kind not in KIND_FOLDERS:
            continue
        if not isinstance(lines, str):
            raise PathError(f"{path}: {section}.{key} must be a path or lines of paths, found {lines!r}")
        entries += [(kind, Path(os.path.normpath(base / line)), is_default) for line in lines.split("\n") if line]
    return entries
