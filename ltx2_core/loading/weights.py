"""The logical weights of a file: which of its tensors together hold one matrix, and in which format.

What decides, for each layer: its ``comfy_quant`` tensor, then the file's ``_quantization_metadata``, then the scales
beside its weight, then the weight's dtype. FP8 without a scale is a cast: a scale is never assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from ...kernels import fp8, mxfp8, nvfp4
from ...kernels.ggml import BLOCKS
from ..config.version import TRANSFORMER_PREFIX
from .checkpoint import FLOAT_DTYPES, GGUF_SUFFIX, Checkpoint, CheckpointError, TensorInfo, parse_json
from .gguf import norm_offset

Shape = tuple[int, ...]

_FP8 = ("F8_E4M3", "F8_E5M2")
_E8M0 = ("F8_E8M0", "U8")

# the last part of the name of a tensor beside "X.weight" -> its role
_ROLES = {
    "comfy_quant": "comfy_quant",
    "weight_scale": "scale",
    "scale_weight": "scale",
    "weight_scale_2": "scale_2",
    "input_scale": "input_scale",
    "scale_input": "input_scale",
}
_NAMES = {"scale": "weight_scale", "scale_2": "weight_scale_2"}
# rows are a whole number of these
_BLOCK = {"fp8": 1, "mxfp8": mxfp8.BLOCK, "nvfp4": nvfp4.BLOCK}
# says that the file's FP8 weights have scales
_MARKER = "scaled_fp8"

# ComfyUI's name of a format -> ours, and the dtype of the weight
_COMFY_FORMATS = {
    "float8_e4m3fn": ("fp8", "F8_E4M3"),
    "float8_e5m2": ("fp8", "F8_E5M2"),
    "nvfp4": ("nvfp4", "U8"),
    "mxfp8": ("mxfp8", "F8_E4M3"),
}
_READ = "what is read is bf16, fp16, float32, fp8 (float8_e4m3fn, float8_e5m2), mxfp8, nvfp4, and GGUF"

_AGAIN = "the file is damaged or was converted wrongly: get it again"

_MAX_COMFY_QUANT_BYTES = 65_536
_MAX_METADATA_CHARACTERS = 4_000_000


class Weight(NamedTuple):
    """One tensor of a model as a file holds it.

    name: the checkpoint's name of the logical tensor ("....to_q.weight"). shape: logical, (out, in) for a matrix, not
    that of the packed bytes. format: "plain" or one of ``kernels.packed.FORMATS``. parts: role -> tensor of the file:
    "data", and where the format has them "scale", "scale_2" and "input_scale". offset: to be added to the values after
    unpacking, in float32 (GGUF stores the norms of Gemma 3 with 1 added).
    """

    name: str
    shape: Shape
    format: str
    parts: Mapping[str, TensorInfo]
    offset: float = 0.0

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts in the file."""
        return sum(info.size_bytes for info in self.parts.values())


_found: WeakKeyDictionary[Checkpoint, Mapping[str, Weight]] = WeakKeyDictionary()


def weights_of(file: Checkpoint) -> Mapping[str, Weight]:
    """Logical name -> weight, in the order of the file; found once per Checkpoint.

    Tensors that only describe a format (``comfy_quant``, the ``scaled_fp8`` marker) are no weights. Raises
    CheckpointError, naming the tensor, for a format that is not read, and for scales that are missing, too many or of
    another shape or dtype than their format has; whether their values are finite is the reader's to check.
    """
    if file not in _found:
        found = _gguf_weights(file) if file.path.suffix.lower() == GGUF_SUFFIX else _safetensors_weights(file)
        _found[file] = MappingProxyType({weight.name: weight for weight in found})
    return _found[file]


def _gguf_weights(file: Checkpoint) -> Iterator[Weight]:
    for info in file.tensors.values():
        format = info.dtype.lower() if info.dtype.lower() in BLOCKS else "plain"
        yield Weight(info.name, info.shape, format, MappingProxyType({"data": info}), norm_offset(file, info.name))


def _safetensors_weights(file: Checkpoint) -> Iterator[Weight]:
    layers, own = _layers(file)
    declared = _declared_in_metadata(file) | _declared_in_tensors(file, layers)
    scaled = any(map(_is_marker, file.tensors))
    for info in own:
        layer = _layer(info.name)
        beside = layers.get(layer, {}) if layer is not None else {}
        format = declared.get(layer) if layer is not None else None
        if format is not None or beside or (scaled and info.dtype in _FP8 and len(info.shape) == 2):
            yield _packed(file, info, beside, format)
        else:
            format = "fp8_cast" if info.dtype in _FP8 else "plain"
            yield Weight(info.name, info.shape, format, MappingProxyType({"data": info}))


# what a file declares ------------------------------------------------------------------------------------------------


def _layers(file: Checkpoint) -> tuple[dict[str, dict[str, TensorInfo]], list[TensorInfo]]:
    """Layer -> role -> the tensors beside its weight; and the tensors that are beside no other."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    own = []
    for info in file.tensors.values():
        layer, dot, last = info.name.rpartition(".")
        role = _ROLES.get(last) if dot else None
        if role is None:
            if last != _MARKER:
                own.append(info)
            continue
        roles = layers.setdefault(layer, {})
        if role in roles:
            raise _error(file, f"{_shown(roles[role].name)} and {_shown(info.name)} are the same thing", _AGAIN)
        if f"{layer}.weight" not in file.tensors:
            raise _error(file, f"{_shown(info.name)} belongs to {_shown(layer + '.weight')}, which is missing", _AGAIN)
        roles[role] = info
    return layers, own


def _is_marker(name: str) -> bool:
    return name.rpartition(".")[2] == _MARKER


def _layer(name: str) -> str | None:
    layer = name.removesuffix(".weight")
    return layer if layer != name else None


def _declared_in_tensors(file: Checkpoint, layers: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, str]:
    """Layer -> ComfyUI's name of its format, from JSON that is stored as a tensor of bytes."""
    infos = {layer: roles["comfy_quant"] for layer, roles in layers.items() if "comfy_quant" in roles}
    return {
        layer: _comfy_format(file, f"tensor {_shown(infos[layer].name)}", _parsed(file, infos[layer].name, text))
        for layer, text in _read_texts(file, infos)
    }


def _read_texts(file: Checkpoint, infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, bytes]]:
    for info in infos.values():
        if info.dtype not in ("U8", "I8") or info.size_bytes > _MAX_COMFY_QUANT_BYTES:
            found = f"tensor {_shown(info.name)} is {info.dtype} of {info.size_bytes} bytes"
            raise _error(file, found, f"it must be U8 of at most {_MAX_COMFY_QUANT_BYTES}")
    if not infos:
        return
    try:
        with file.path.open("rb") as stream:
            for layer, info in infos.items():
                stream.seek(info.begin)
                text = stream.read(info.size_bytes)
                if len(text) != info.size_bytes:
                    raise _error(
                        file, f"the file ends inside tensor {_shown(info.name)}", "it was cut short: " + _AGAIN
                    )
                yield layer, text
    except OSError as error:
        raise _error(file, f"reading failed ({error.strerror or error})", "check the disk") from error


def _declared_in_metadata(file: Checkpoint) -> dict[str, str]:
    """Layer -> ComfyUI's name of its format, from the file's metadata; only layers that the file has."""
    key = "_quantization_metadata"
    text = file.metadata.get(key)
    if text is None:
        return {}
    if len(text) > _MAX_METADATA_CHARACTERS:
        found = f"metadata {key} has {len(text)} characters (allowed {_MAX_METADATA_CHARACTERS})"
        raise _error(file, found, _AGAIN)
    parsed = _parsed(file, key, text.encode())
    layers = parsed.get("layers") if isinstance(parsed, dict) else None
    if not isinstance(layers, dict):
        raise _error(file, f'metadata {key} is not an object with "layers"', _AGAIN)
    formats = {}
    for name, entry in layers.items():
        for layer in (name, TRANSFORMER_PREFIX + name):
            if f"{layer}.weight" in file.tensors:
                formats[layer] = _comfy_format(file, f"{key} of {_shown(name)}", entry)
                break
    return formats


def _parsed(file: Checkpoint, name: str, text: bytes) -> Any:
    try:
        return parse_json(text.decode("utf-8"), parse_float=float)
    except (ValueError, RecursionError) as error:
        raise _error(file, f"{_shown(name)} is not valid JSON ({str(error)[:200]})", _AGAIN) from error


def _comfy_format(file: Checkpoint, what: str, entry: Any) -> str:
    format = entry.get("format") if isinstance(entry, dict) else None
    if not isinstance(format, str):
        raise _error(file, f"{what} names no format", f'it must be an object with "format"; {_AGAIN}')
    if entry.get("convrot"):
        format += " with convrot"
    if format not in _COMFY_FORMATS:
        raise _error(file, f"{what} says that weights are stored as {_shown(format)}", f"{_READ}: use such a file")
    return format


# packed weights ------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A tensor that a format needs beside its data. shapes: what fits, in words."""

    role: str
    dtypes: Sequence[str]
    fits: Callable[[Shape], bool]
    shapes: str


def _packed(file: Checkpoint, data: TensorInfo, beside: Mapping[str, TensorInfo], declared: str | None) -> Weight:
    format, dtype = _COMFY_FORMATS[declared] if declared is not None else (_inferred(file, data, beside), data.dtype)
    name = _shown(data.name)
    if data.dtype != dtype:
        raise _error(file, f"tensor {name} is {data.dtype}, but {declared} is {dtype}", _AGAIN)
    if len(data.shape) != 2:
        raise _error(file, f"tensor {name} is {format} of shape {list(data.shape)}", "only matrices can be; " + _AGAIN)
    shape = (data.shape[0], data.shape[1] * (2 if format == "nvfp4" else 1))
    if shape[1] % _BLOCK[format]:
        found = f"tensor {name} is {format} with rows of {shape[1]} weights"
        raise _error(file, found, f"they must be a multiple of {_BLOCK[format]}; {_AGAIN}")
    parts = {role: info for role, info in beside.items() if role != "comfy_quant"}
    needed = {part.role: part for part in _parts(format, shape)}
    for role, part in needed.items():
        if role not in parts and role != "input_scale":
            wanted = f"needed is {' or '.join(part.dtypes)} {part.shapes}"
            raise _error(file, f"tensor {name} is {format} and has no {_NAMES[role]}", f"{wanted}; {_AGAIN}")
    for role, info in parts.items():
        _check_part(file, info, needed.get(role), f"{format} of shape {list(shape)}")
    return Weight(data.name, shape, format, MappingProxyType({"data": data, **parts}))


def _check_part(file: Checkpoint, info: TensorInfo, part: _Part | None, weight: str) -> None:
    found = f"tensor {_shown(info.name)} is {info.dtype} of shape {list(info.shape)}, beside a weight in {weight}"
    if part is None:
        raise _error(file, found, f"such a weight has none; {_AGAIN}")
    if info.dtype not in part.dtypes or not part.fits(info.shape):
        raise _error(file, found, f"needed is {' or '.join(part.dtypes)} {part.shapes}; {_AGAIN}")


def _inferred(file: Checkpoint, data: TensorInfo, beside: Mapping[str, TensorInfo]) -> str:
    """The format of a weight that has tensors beside it, or a marker in its file, but no declaration."""
    if data.dtype == "F8_E4M3" and "scale" in beside and beside["scale"].dtype in _E8M0:
        return "mxfp8"
    if data.dtype in _FP8:
        return "fp8"
    if data.dtype == "U8":
        return "nvfp4"
    there = ", ".join(_shown(info.name) for info in beside.values())
    raise _error(
        file, f"tensor {_shown(data.name)} is {data.dtype} with {there} beside it", f"{_READ}: use such a file"
    )


def _parts(format: str, shape: tuple[int, int]) -> tuple[_Part, ...]:
    """What belongs beside a weight of a format; an input_scale may be absent."""
    single = _Part("scale_2", FLOAT_DTYPES, lambda found: math.prod(found) == 1, "with one number")
    of_inputs = single._replace(role="input_scale")
    if format == "fp8":
        blocks = [-(-size // fp8.BLOCK) for size in shape]
        shapes = f"with one number, of shape {[shape[0], 1]} (rows) or of shape {blocks} (blocks)"
        return _Part("scale", FLOAT_DTYPES, lambda found: fp8.scale_kind(found, shape) is not None, shapes), of_inputs
    tiles = mxfp8.scale_shape(*shape) if format == "mxfp8" else nvfp4.scale_shape(*shape)
    dtypes = _E8M0 if format == "mxfp8" else ("F8_E4M3",)
    scale = _Part("scale", dtypes, lambda found: found == tiles, f"of shape {list(tiles)} (whole tiles of 128 x 4)")
    return (scale, of_inputs) if format == "mxfp8" else (scale, single, of_inputs)


# messages ------------------------------------------------------------------------------------------------------------


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")


def _error(file: Checkpoint, problem: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{file.path}: {problem}: {remedy}")
