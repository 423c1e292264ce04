"""Weight files: a reader that believes nothing the header says before it has checked it.

Format of safetensors: https://github.com/huggingface/safetensors, section "Format"; GGUF headers are read in gguf.py.
Files are read, never mapped: a mapped file that is cut short while in use ends the process.
"""

from __future__ import annotations

import json
import logging
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..config.released import released_config
from ..config.version import ModelVersion, VersionError, layout, looks_like, recognise

log = logging.getLogger("ltx2")

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
GGUF_SUFFIX = ".gguf"
SUFFIXES = (*SAFETENSORS_SUFFIXES, GGUF_SUFFIX)

_MAX_HEADER_BYTES = 100_000_000
_MAX_TENSORS = 200_000
# three brackets a tensor, and room for brackets inside the metadata's strings
_MAX_BRACKETS = 3 * _MAX_TENSORS + 1_000_000
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 2**48
_MAX_CONFIG_CHARACTERS = 1_000_000

# name in the file -> (torch's name, bytes per element)
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "BOOL": ("bool", 1),
}

# those that this torch has
_TORCH_DTYPES = {name: getattr(torch, known) for name, (known, _) in _DTYPES.items() if hasattr(torch, known)}

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

_ENTRY = {"dtype", "shape", "data_offsets"}

_AGAIN = "download it again"
_NOT_SAFETENSORS = "it is not a valid safetensors file; " + _AGAIN


class CheckpointError(ValueError):
    """A checkpoint file cannot be used; the message names the file, what was found and what to do."""


# a tuple: files have thousands, and a frozen dataclass takes three times as long to make
class TensorInfo(NamedTuple):
    """One tensor of a file. begin and end are offsets in bytes from the start of the file.

    dtype: safetensors' name of it, or one of GGUF's block formats ("Q4_K"), whose shape is that of the unpacked tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that the tensor has when it is read: uint8 for blocks and for types that this torch lacks."""
        return _TORCH_DTYPES.get(self.dtype, torch.uint8)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape that the tensor has when it is read: (size in bytes,) for blocks and for types that torch lacks."""
        return self.shape if self.dtype in _TORCH_DTYPES else (self.size_bytes,)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The checked header of a weight file. Holds no tensor data and no open file.

    metadata: the file's strings; of a GGUF file its numbers too, as text. tensors: name -> TensorInfo, in the order of
    the file; those of a GGUF file under the names of the released checkpoints.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    size_bytes: int
    mtime_ns: int

    @property
    def identity(self) -> tuple[str, int, int]:
        """Path, size and time of change: equal as long as the file is the same."""
        return str(self.path), self.size_bytes, self.mtime_ns

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical name -> logical shape: a packed weight counts once, unpacked.

        Raises CheckpointError when the parts of a packed weight do not belong together.
        """
        from .weights import weights_of  # that file needs this one

        return {name: weight.shape for name, weight in weights_of(self).items()}

    def version(self) -> ModelVersion:
        """The release that the file belongs to; CheckpointError when it is no LTX-2 checkpoint."""
        try:
            return recognise(self.metadata, self.shapes)
        except VersionError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def looks_like(self) -> str:
        """What the file seems to be, as a phrase for messages."""
        try:
            shapes = self.shapes
        except CheckpointError:
            shapes = {name: info.shape for name, info in self.tensors.items()}
        return looks_like(self.metadata, shapes)

    def config(self) -> dict[str, Any]:
        """The configuration in the file's metadata, or the released one of its version when it carries none.

        Raises CheckpointError when the metadata's JSON is unusable, or when there is none and the tensors do not tell
        which released configuration applies.
        """
        text = self.metadata.get("config")
        if text is None:
            return self._assumed_config()
        if len(text) > _MAX_CONFIG_CHARACTERS:
            raise _error(self.path, f"its config has {len(text)} characters (allowed {_MAX_CONFIG_CHARACTERS})", _AGAIN)
        try:
            config = parse_json(text, parse_float=float)
        except (ValueError, RecursionError) as error:
            raise _error(self.path, f"the config in its metadata is not valid JSON ({error})", _AGAIN) from error
        if not isinstance(config, dict):
            raise _error(self.path, f"the config in its metadata is a {type(config).__name__}, not an object", _AGAIN)
        return config

    def _assumed_config(self) -> dict[str, Any]:
        try:
            label = layout(self.metadata, self.shapes)
            config = None if label is None else released_config(label)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: no config in the metadata, and {error}") from error
        if config is None:
            raise _error(
                self.path,
                f"no config in the metadata, and none is known for its tensors: it looks like {self.looks_like()}",
                "use the file as it was released, with its metadata",
            )
        log.warning("%s carries no config: the released configuration of LTX %s is assumed", self.path.name, label)
        return config


def read_header(path: Path) -> Checkpoint:
    """Read and check the header of a safetensors or GGUF file; no tensor data is read.

    Raises CheckpointError that names the file, the tensor, what was found, what is allowed and what to do.
    """
    from .gguf import read_gguf  # that file needs this one

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise _error(path, f"the name ends in {path.suffix!r}", f"weights must be {', '.join(SUFFIXES)} files")
    try:
        # checked before opening: opening a pipe would wait for its writer
        if not stat.S_ISREG(path.stat().st_mode):
            raise _error(path, "this is not a regular file", "choose a file with weights")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            read = read_gguf if suffix == GGUF_SUFFIX else _read_safetensors
            metadata, tensors = read(file, path, status.st_size)
    except OSError as error:
        raise _error(
            path, f"the file cannot be read ({error.strerror or error})", "check its name and rights"
        ) from error
    return Checkpoint(
        path=path,
        metadata=MappingProxyType(metadata),
        tensors=MappingProxyType({info.name: info for info in tensors}),
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
    )


def read_tensors(
    checkpoint: Checkpoint,
    names: Iterable[str],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one after another, in the order of the file, each into fresh memory on ``device``.

    dtype: what F64, F32, F16 and BF16 tensors are cast to; other tensors stay as stored. None keeps every tensor; one in
    blocks of GGUF comes as uint8 [size in bytes].
    on_bytes: called with the number of bytes read since its last call; what it raises ends the reading.
    Raises CheckpointError at once for a name that the file lacks and, given a dtype, for FP8 and GGUF blocks; while
    reading for a file that ends early or was changed since its header was read.
    """
    infos = sorted({_info(checkpoint, name) for name in names}, key=lambda info: (info.begin, info.end))
    for info in infos:
        known = _DTYPES.get(info.dtype)
        if dtype is not None and (known is None or info.dtype.startswith("F8_")):
            raise quantised_error(checkpoint, info)
        if known is not None and not hasattr(torch, known[0]):
            problem = f"tensor {_shown(info.name)} is {info.dtype}"
            raise _error(checkpoint.path, problem, f"torch lacks {known[0]}: update it")
    return _read_tensors(checkpoint, infos, torch.device(device), dtype, on_bytes)


def quantised_error(checkpoint: Checkpoint, info: TensorInfo) -> CheckpointError:
    """The error for a tensor of an FP8 or packed checkpoint."""
    return _error(
        checkpoint.path,
        f"tensor {_shown(info.name)} is stored as {info.dtype}: quantised (fp8, fp4, int8) checkpoints cannot be used yet",
        "use the bf16 file of the same release",
    )


def _read_tensors(
    checkpoint: Checkpoint,
    infos: list[TensorInfo],
    device: torch.device,
    dtype: torch.dtype | None,
    on_bytes: Callable[[int], None] | None,
) -> Iterator[tuple[str, Tensor]]:
    from .staged import Request, read_staged  # that file needs this one

    requests = (Request(checkpoint, info) for info in infos)
    for request, tensor in read_staged(requests, device=device, on_bytes=on_bytes):
        if dtype is not None and request.info.dtype in FLOAT_DTYPES:
            with torch.inference_mode(False):
                tensor = tensor.to(dtype)
        yield request.info.name, tensor


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo:
    if name not in checkpoint.tensors:
        raise _error(checkpoint.path, f"no tensor {_shown(name)}", f"it looks like {checkpoint.looks_like()}")
    return checkpoint.tensors[name]


def _read_safetensors(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, str], list[TensorInfo]]:
    """Metadata, and the tensors in the order of the file."""
    raw = _header_bytes(file, path, size)
    header = _parse_header(raw, path)
    metadata = _check_metadata(header.pop("__metadata__", {}), path)
    if len(header) > _MAX_TENSORS:
        raise _error(path, f"the header lists {len(header)} tensors (allowed {_MAX_TENSORS})", _NOT_SAFETENSORS)
    data_start = 8 + len(raw)
    tensors = [_check_entry(name, entry, data_start, path) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    _check_coverage(tensors, data_start, size, path)
    return metadata, tensors


def _header_bytes(file: BinaryIO, path: Path, size: int) -> bytes:
    prefix = file.read(512)
    if len(prefix) <= 8:
        problem = "the file is empty" if not prefix else f"the file has only {len(prefix)} bytes"
        raise _error(path, problem, f"{disguise(prefix) or 'the download is incomplete'}; {_AGAIN}")
    length = int.from_bytes(prefix[:8], "little")
    # a disguise is looked for only where the header is impossible: a good length may begin with any byte
    if length > _MAX_HEADER_BYTES or not prefix[8:].startswith(b"{"):
        found = f"the header would have {length} bytes (allowed {_MAX_HEADER_BYTES}) and must begin with a brace"
        raise _error(path, found, disguise(prefix) or _NOT_SAFETENSORS)
    if 8 + length > size:
        raise _truncated(path, size, 8 + length)
    file.seek(8)
    raw = file.read(length)
    if len(raw) != length:
        raise _truncated(path, 8 + len(raw), 8 + length)
    return raw


def disguise(prefix: bytes) -> str | None:
    """What a file whose first bytes are not those of its format really is, and what to do about it."""
    text = prefix.lstrip().lower()
    if prefix.startswith(b"PK") or (prefix[:1] == b"\x80" and prefix[1:2] <= b"\x05"):
        return "this is a PyTorch pickle (.ckpt/.pt) with another name; use the .safetensors release"
    if prefix.startswith(b"GGUF"):
        return "this is a GGUF file with another name; rename it to end in .gguf"
    if text.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not the weights; run `git lfs pull` or download the file itself"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page, not the weights: the download went wrong (a login or a wrong address); " + _AGAIN
    if prefix and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in prefix):
        return "this is a text file, not the weights; " + _AGAIN
    return None


def _parse_header(raw: bytes, path: Path) -> dict[str, Any]:
    brackets = raw.count(b"{") + raw.count(b"[")
    if brackets > _MAX_BRACKETS:
        raise _error(path, f"the header has {brackets} brackets (allowed {_MAX_BRACKETS})", _NOT_SAFETENSORS)
    try:
        header = parse_json(raw.decode("utf-8"), parse_float=_refuse)
    except (ValueError, RecursionError) as error:
        raise _error(path, f"the header is not valid JSON ({str(error)[:200]})", _NOT_SAFETENSORS) from error
    if not isinstance(header, dict):
        raise _error(path, f"the header is a {type(header).__name__}, not an object", _NOT_SAFETENSORS)
    return header


def parse_json(text: str, parse_float: Callable[[str], Any]) -> Any:
    return json.loads(
        text, object_pairs_hook=_unique, parse_int=_integer, parse_float=parse_float, parse_constant=_refuse
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {_shown(twice)} stands there {count} times")
    return found


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _refuse(text: str) -> Any:
    raise ValueError(f"number {text[:40]} is not a whole number")


def _check_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise _error(path, f"__metadata__ is a {type(metadata).__name__}, not an object", _NOT_SAFETENSORS)
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise _error(path, f"metadata {_shown(key)} is a {type(value).__name__}, not a string", _NOT_SAFETENSORS)
        if not (_is_unicode(key) and _is_unicode(value)):
            raise _error(path, f"metadata {_shown(key)} is not valid Unicode", _NOT_SAFETENSORS)
    return metadata


def _check_entry(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    def wrong(problem: str) -> CheckpointError:
        return _error(path, f"tensor {_shown(name)}: {problem}", _NOT_SAFETENSORS)

    if not _is_unicode(name):
        raise wrong("the name is not valid Unicode")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise wrong("the entry must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise wrong(f"dtype {_shown(dtype)} is not one of {', '.join(_DTYPES)}")
    if not _is_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise wrong(f"shape {_shown(shape)} is not a list of at most {_MAX_DIMENSIONS} whole numbers")
    # empty dimensions count as 1, or a zero would hide a product that no tensor library can hold
    if math.prod([size or 1 for size in shape]) > _MAX_ELEMENTS:
        raise wrong(f"shape {_shown(shape)} has more than {_MAX_ELEMENTS} elements")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise wrong(f"data_offsets {_shown(offsets)} are not two whole numbers")
    begin, end = offsets
    size_bytes = math.prod(shape) * _DTYPES[dtype][1]
    if end - begin != size_bytes:
        raise wrong(f"data_offsets {offsets} span {end - begin} bytes, but {dtype} of shape {shape} takes {size_bytes}")
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _check_coverage(tensors: list[TensorInfo], data_start: int, size: int, path: Path) -> None:
    """The tensors, in order, must fill the file exactly."""
    promised = max((info.end for info in tensors), default=data_start)
    if promised > size:
        raise _truncated(path, size, promised)
    position = data_start
    for info in tensors:
        if info.begin != position:
            problem = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            found = f"tensor {_shown(info.name)} begins at byte {info.begin} instead of {position} and {problem}"
            raise _error(path, found, _NOT_SAFETENSORS)
        position = info.end
    if position != size:
        raise _error(path, f"the file has {size} bytes, its header describes {position}", _NOT_SAFETENSORS)


def _is_counts(value: Any) -> bool:
    # `type` and not isinstance: true and false are no sizes
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _is_unicode(text: str) -> bool:
    """Whether a string has no lone surrogates, which JSON can write but nothing can print."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    text = repr(value[:200] if isinstance(value, str | list) else value)
    return text if len(text) <= 200 else text[:200] + "..."


def _truncated(path: Path, size: int, promised: int) -> CheckpointError:
    return _error(
        path, f"the file has {size} bytes, its header promises {promised}", "the download is incomplete; " + _AGAIN
    )


def _error(path: Path, problem: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{path}: {problem}: {remedy}")
