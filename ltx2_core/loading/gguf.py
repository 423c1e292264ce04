"""GGUF headers: a reader that believes no count and no length before it has compared it with the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3 (they differ in nothing that is read
here). Tensors are presented under the names of the released checkpoints.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from ...kernels.ggml import BLOCKS, packed_bytes
from ..config.version import TRANSFORMER_PREFIX
from .checkpoint import Checkpoint, CheckpointError, TensorInfo, disguise

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT, _MAX_ALIGNMENT = 32, 65536

_MAX_HEADER_BYTES = 100_000_000
_MAX_KEYS = 10_000
_MAX_TENSORS = 100_000
_MAX_NAME_BYTES = 1024
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 2**48
_MAX_LISTED_STRINGS = 2_000_000
_WINDOW_BYTES = 2**20
# longer strings (tokenizers, templates) are passed over; a config is shorter
_MAX_KEPT_BYTES = 1_000_000
_MAX_METADATA_BYTES = 4_000_000

_ARCHITECTURE = "general.architecture"
_ALIGNMENT = "general.alignment"
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

# type of a metadata value -> struct's letter
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")

# type of a tensor -> its name
_PLAIN_TYPES = {0: "F32", 1: "F16", 30: "BF16", 28: "F64", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}
_BLOCK_TYPES = {8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
_OTHER_TYPES = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K"}
_OTHER_TYPES |= {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"}
_OTHER_TYPES |= {23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
_READ_TYPES = "F32, BF16, F16, Q8_0, Q6_K, Q5_K and Q4_K"

_AGAIN = "download it again"
_DAMAGED = "the file is damaged: " + _AGAIN
_INCOMPLETE = "the download is incomplete; " + _AGAIN

# llama.cpp's names of Gemma 3: outside of the layers, and in one
_GEMMA = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GEMMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NAME = re.compile(r"blk\.([0-9]+)\.([a-z_]+)\.weight")

# what a whole checkpoint holds beside its transformer
_OTHER_PARTS = ("vae.", "audio_vae.", "vocoder.", "text_embedding_projection.")


def read_gguf(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, str], list[TensorInfo]]:
    """Read and check the header of a GGUF file of ``size`` bytes, from its beginning.

    Returns metadata (strings as they are, numbers and booleans as text; arrays and strings beyond a million bytes are
    left out) and the tensors in the order of the file. Raises CheckpointError that names the file, what was found and
    what to do; OSError while reading is the caller's.
    """
    header = _Header(file, path, size)
    tensors, keys = header.start()
    metadata, shapes, alignment = _metadata(header, keys)
    rename = _renaming(metadata, path)
    raw = [_entry(header) for _ in range(tensors)]
    data_start = header.position + -header.position % alignment
    infos = [_info(entry, shapes, rename, data_start, alignment, path, size) for entry in raw]
    _check_once([name for name, *_ in raw], "tensor", path)
    _check_once([info.name for info in infos], "tensor", path)
    infos.sort(key=lambda info: (info.begin, info.end))
    for before, info in pairwise(infos):
        if info.begin < before.end:
            found = f"tensor {_shown(info.name)} begins at byte {info.begin}, inside {_shown(before.name)}"
            raise _error(path, found, _DAMAGED)
    return metadata, infos


def read_arrays(path: Path, names: Collection[str]) -> dict[str, list[Any]]:
    """Arrays of numbers or strings of a GGUF file's metadata, which ``read_header`` passes over: a tokenizer's.

    Absent ones are left out. Raises CheckpointError as ``read_gguf`` does.
    """
    found: dict[str, list[Any]] = {}
    try:
        with path.open("rb") as file:
            header = _Header(file, path, path.stat().st_size)
            _, keys = header.start()
            for _ in range(keys):
                name = header.text(_MAX_NAME_BYTES, "the name of a metadata key")
                what = f"metadata {_shown(name)}"
                if name in names:
                    found[name] = _array(header, what)
                else:
                    _value(header, what, wanted=False)
    except OSError as error:
        problem = f"the file cannot be read ({error.strerror or error})"
        raise _error(path, problem, "check its name and rights") from error
    return found


def norm_offset(file: Checkpoint, name: str) -> float:
    """What is to be added to a tensor of the file: -1 for norms of Gemma 3, which llama.cpp stores with 1 added."""
    stored_with_one = file.metadata.get(_ARCHITECTURE) == "gemma3" and name.endswith("norm.weight")
    return -1.0 if stored_with_one else 0.0


# reading -------------------------------------------------------------------------------------------------------------


class _Header:
    """The bytes of a header, front to back."""

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.file, self.path, self.size = file, path, size
        self.position = 0
        self.strings_left = _MAX_LISTED_STRINGS

    def start(self) -> tuple[int, int]:
        """How many tensors and how many metadata keys there are."""
        prefix = self.file.read(512)
        if not prefix.startswith(_MAGIC):
            raise _error(self.path, "the file does not begin with GGUF", _what_it_is(prefix))
        self.file.seek(4)
        self.position = 4
        version = self.number("I", "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in _VERSIONS
            found = f"GGUF of version {version}" if not swapped else "a GGUF file for big-endian machines"
            raise _error(self.path, found, "what is read is GGUF of version 2 or 3, little-endian: get another file")
        tensors, keys = self.number("Q", "the tensor count"), self.number("Q", "the key count")
        for count, allowed, least, what in ((tensors, _MAX_TENSORS, 24, "tensors"), (keys, _MAX_KEYS, 13, "keys")):
            if count > min(allowed, self.left // least):
                found = f"the header would list {count} {what}, in {self.left} bytes (allowed {allowed})"
                raise _error(self.path, found, _DAMAGED)
        return tensors, keys

    @property
    def left(self) -> int:
        return min(self.size, _MAX_HEADER_BYTES) - self.position

    def take(self, count: int, what: str) -> bytes:
        self._advance(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise _error(self.path, f"the file ends inside {what}", _INCOMPLETE)
        return data

    def peek(self) -> bytes:
        """The next bytes, up to a mebibyte, without passing over them."""
        data = self.file.read(_WINDOW_BYTES)
        self.file.seek(self.position)
        return data

    def skip(self, count: int, what: str) -> None:
        self._advance(count, what)
        self.file.seek(count, 1)

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter), what))[0]

    def text(self, allowed: int, what: str) -> str:
        length = self.number("Q", what)
        if length > allowed:
            raise _error(self.path, f"{what} would have {length} bytes (allowed {allowed})", _DAMAGED)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _error(self.path, f"{what} is not valid UTF-8", _DAMAGED) from error

    def _advance(self, count: int, what: str) -> None:
        if count > self.left:
            if self.position + count > self.size:
                found = f"{what} would end at byte {self.position + count} of a file of {self.size}"
                raise _error(self.path, found, _INCOMPLETE)
            raise _error(self.path, f"the header has more than {_MAX_HEADER_BYTES} bytes", _DAMAGED)
        self.position += count


def _metadata(header: _Header, keys: int) -> tuple[dict[str, str], dict[str, tuple[int, ...]], int]:
    """The strings and numbers; the original shapes of tensors; the alignment."""
    metadata: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    alignment: Any = _DEFAULT_ALIGNMENT
    names = []
    kept = 0
    for _ in range(keys):
        name = header.text(_MAX_NAME_BYTES, "the name of a metadata key")
        names.append(name)
        value = _value(header, f"metadata {_shown(name)}", wanted=name.startswith(_ORIGINAL_SHAPE))
        if name == _ALIGNMENT:
            alignment = value
        if isinstance(value, tuple):
            shapes[name.removeprefix(_ORIGINAL_SHAPE)] = value
        elif value is not None:
            metadata[name] = value if isinstance(value, str) else str(value)
            kept += len(metadata[name].encode())
        if kept > _MAX_METADATA_BYTES:
            raise _error(header.path, f"more than {_MAX_METADATA_BYTES} bytes of metadata", _DAMAGED)
    _check_once(names, "metadata", header.path)
    if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        found = f"{_ALIGNMENT} is {_shown(alignment)}, not a power of two from 8 to {_MAX_ALIGNMENT}"
        raise _error(header.path, found, _DAMAGED)
    return metadata, shapes, alignment


def _value(header: _Header, what: str, wanted: bool) -> Any:
    """A string, a number, or a tuple for a short array of whole numbers that is wanted; None for what is passed over."""
    kind = header.number("I", what)
    if kind in _NUMBERS:
        return header.number(_NUMBERS[kind], what)
    if kind == _STRING:
        return _string(header, what)
    if kind != _ARRAY:
        raise _error(header.path, f"{what} is of type {kind}, which GGUF does not have", _DAMAGED)
    item, count = header.number("I", what), header.number("Q", what)
    if item == _STRING:
        _skip_strings(header, count, what)
        return None
    if item not in _NUMBERS:
        raise _error(header.path, f"{what} is an array of type {item}; only numbers and strings are read", _DAMAGED)
    letter = _NUMBERS[item]
    if not wanted:
        header.skip(count * struct.calcsize("<" + letter), what)
        return None
    if letter in "fd?" or count > 16:
        raise _error(header.path, f"{what} is not a shape: {count} items of type {item}", _DAMAGED)
    return tuple(header.number(letter, what) for _ in range(count))


def _string(header: _Header, what: str) -> str | None:
    length = header.number("Q", what)
    if length > _MAX_KEPT_BYTES:
        header.skip(length, what)
        return None
    try:
        return header.take(length, what).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _error(header.path, f"{what} is not valid UTF-8", _DAMAGED) from error


def _array(header: _Header, what: str) -> list[Any]:
    """An array of numbers or strings, as many as the rest of the header can hold."""
    kind = header.number("I", what)
    item, count = (header.number("I", what), header.number("Q", what)) if kind == _ARRAY else (kind, 0)
    if kind != _ARRAY or (item != _STRING and item not in _NUMBERS):
        raise _error(header.path, f"{what} is no array of numbers or strings", _DAMAGED)
    if item == _STRING:
        if count > min(header.strings_left, header.left // 8):
            raise _error(header.path, f"{what} would list {count} strings, in {header.left} bytes", _DAMAGED)
        header.strings_left -= count
        return [header.text(_MAX_NAME_BYTES, what) for _ in range(count)]
    letter = _NUMBERS[item]
    data = header.take(count * struct.calcsize("<" + letter), what)
    return list(struct.unpack(f"<{count}{letter}", data))


def _skip_strings(header: _Header, count: int, what: str) -> None:
    if count > min(header.strings_left, header.left // 8):
        found = f"{what} would list {count} strings, in {header.left} bytes (allowed {header.strings_left})"
        raise _error(header.path, found, _DAMAGED)
    header.strings_left -= count
    # a tokenizer lists half a million: one call each would take seconds
    while count:
        window, position = header.peek(), 0
        while count and position + _LENGTH.size <= len(window):
            position += _LENGTH.size + _LENGTH.unpack_from(window, position)[0]
            count -= 1
        header.skip(max(position, _LENGTH.size), what)


# tensors -------------------------------------------------------------------------------------------------------------

_Entry = tuple[str, tuple[int, ...], int, int]


def _entry(header: _Header) -> _Entry:
    """Name, shape (slowest dimension first), type and offset of a tensor, as stored."""
    name = header.text(_MAX_NAME_BYTES, "the name of a tensor")
    what = f"the entry of tensor {_shown(name)}"
    rank = header.number("I", what)
    if rank > _MAX_DIMENSIONS:
        raise _error(header.path, f"tensor {_shown(name)} has {rank} dimensions (allowed {_MAX_DIMENSIONS})", _DAMAGED)
    sizes = tuple(header.number("Q", what) for _ in range(rank))
    # the format names the fastest dimension first
    return name, sizes[::-1], header.number("I", what), header.number("Q", what)


def _info(
    entry: _Entry,
    shapes: dict[str, tuple[int, ...]],
    rename: Callable[[str], str],
    data_start: int,
    alignment: int,
    path: Path,
    size: int,
) -> TensorInfo:
    name, stored, kind, offset = entry
    # empty dimensions count as 1, or a zero would hide a product that no tensor library can hold
    if math.prod(max(length, 1) for length in stored) > _MAX_ELEMENTS:
        found = f"tensor {_shown(name)} of shape {list(stored)} has more than {_MAX_ELEMENTS} elements"
        raise _error(path, found, _DAMAGED)
    dtype, size_bytes = _type_and_bytes(name, stored, kind, path)
    begin = data_start + offset
    if offset % alignment:
        found = f"tensor {_shown(name)} begins at offset {offset}, which is no multiple of {alignment}"
        raise _error(path, found, _DAMAGED)
    if begin + size_bytes > size:
        found = f"the file has {size} bytes, but tensor {_shown(name)} would end at byte {begin + size_bytes}"
        raise _error(path, found, _INCOMPLETE)
    shape = shapes.get(name, stored)
    if min(shape, default=0) < 0 or math.prod(shape) != math.prod(stored):
        found = f"{_ORIGINAL_SHAPE}{name} is {list(shape)}, but the tensor is stored as {list(stored)}"
        raise _error(path, found, _DAMAGED)
    return TensorInfo(rename(name), dtype, shape, begin, begin + size_bytes)


def _type_and_bytes(name: str, shape: tuple[int, ...], kind: int, path: Path) -> tuple[str, int]:
    if kind in _PLAIN_TYPES:
        dtype = _PLAIN_TYPES[kind]
        return dtype, math.prod(shape) * _ITEM_BYTES[dtype]
    if kind not in _BLOCK_TYPES:
        found = _OTHER_TYPES.get(kind, f"type {kind}, which is not known")
        raise _error(path, f"tensor {_shown(name)} is stored as {found}", f"use a file with {_READ_TYPES} only")
    dtype = _BLOCK_TYPES[kind]
    weights = BLOCKS[dtype.lower()].weights
    if not shape or shape[-1] % weights:
        found = f"tensor {_shown(name)} of shape {list(shape)} is no whole number of {dtype} blocks of {weights} a row"
        raise _error(path, found, _DAMAGED)
    return dtype, packed_bytes(dtype.lower(), shape)


# names ---------------------------------------------------------------------------------------------------------------


def _renaming(metadata: dict[str, str], path: Path) -> Callable[[str], str]:
    """What gives the file's tensors the names of the released checkpoints."""
    architecture = metadata.get(_ARCHITECTURE)
    if architecture == "ltxv":
        return _transformer_name
    if architecture == "gemma3":
        return _gemma_name
    found = "has no general.architecture" if architecture is None else f"is a model of kind {_shown(architecture)}"
    raise _error(
        path,
        f"this GGUF file {found}",
        "what is read is ltxv (the transformer of LTX-2) and gemma3 (its text encoder, without the vision file)",
    )


def _transformer_name(name: str) -> str:
    return name if name.startswith((TRANSFORMER_PREFIX, *_OTHER_PARTS)) else TRANSFORMER_PREFIX + name


def _gemma_name(name: str) -> str:
    """The released name; a tensor that llama.cpp's Gemma 3 does not have keeps its own, so that it is reported."""
    layer = _GEMMA_NAME.fullmatch(name)
    if layer is None or layer[2] not in _GEMMA_LAYER:
        return _GEMMA.get(name, name)
    return f"model.layers.{layer[1]}.{_GEMMA_LAYER[layer[2]]}.weight"


# messages ------------------------------------------------------------------------------------------------------------


def _check_once(names: list[str], what: str, path: Path) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _error(path, f"{what} {_shown(name)} stands there more than once", _DAMAGED)
        seen.add(name)


def _what_it_is(prefix: bytes) -> str:
    if len(prefix) > 8 and int.from_bytes(prefix[:8], "little") <= _MAX_HEADER_BYTES and prefix[8:9] == b"{":
        return "this is a safetensors file with another name; rename it to end in .safetensors"
    return disguise(prefix) or f"it is not a GGUF file; {_AGAIN}"


def _shown(value: Any) -> str:
    text = repr(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 200 else text[:200] + "..."


def _error(path: Path, problem: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{path}: {problem}: {remedy}")
