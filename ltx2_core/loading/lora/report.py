"""What a list of LoRAs does to a model, from headers alone."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from ...config.version import ModelVersion
from .delta import ltx_core_knows
from .errors import FITS, LoraError, first, quoted, shown
from .file import LoraFile
from .layer import LoraLayer
from .names import weight_name
from .origin import generation, made_for
from .strength import Strength, check_strength

log = logging.getLogger("ltx2.loading")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FileReport:
    """What one LoRA does to a model.

    matched: our names of the layers and tables that it changes. parameters: our name of a parameter that it changes ->
    the layer of the file. skipped: layer or tensor in the file -> why it, or a part of it, changes nothing.
    """

    file: LoraFile
    strength: Strength
    matched: tuple[str, ...] = field(repr=False)
    parameters: Mapping[str, LoraLayer] = field(repr=False)
    skipped: Mapping[str, str] = field(repr=False)

    @property
    def changed(self) -> tuple[str, ...]:
        """The matched layers whose strength is not 0."""
        return tuple(name for name in self.matched if self.strength.of(name))

    def lines(self) -> Iterator[tuple[int, str]]:
        """The report, line by line, each with its level for the log."""
        file, name = self.file, self.file.path.name
        ranks = f", rank {', '.join(map(str, file.ranks))}" if file.ranks else ""
        what = f"({', '.join(file.titles)}{ranks}) at strength {self.strength}"
        yield logging.INFO, f"{name} {what}: {len(self.changed)} layers changed"
        for scale, count in Counter(file.layers[layer].scale for layer in self.matched).items():
            if scale != 1:
                yield logging.INFO, f"{name}: alpha/rank is {scale:g}, not 1, in {count} layers"
        for reason, count in Counter(self.skipped.values()).items():
            names = [skipped for skipped, why in self.skipped.items() if why == reason]
            yield logging.WARNING, f"{name}: {count} skipped, {reason}: {quoted(names)}"


@dataclass(frozen=True)
class Report:
    """What a list of LoRAs does to a model, in the order of the list; as text, for people."""

    files: tuple[FileReport, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer or table that changes, once; strength 0 changes nothing."""
        return tuple(dict.fromkeys(name for one in self.files for name in one.changed))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter that changes, once."""
        return tuple(dict.fromkeys(name for one in self.files for name in one.parameters if one.strength.of(name)))

    @property
    def size_bytes(self) -> int:
        """How many bytes of the files have to be read."""
        return sum(
            info.size_bytes
            for one in self.files
            for name, layer in one.parameters.items()
            if one.strength.of(name)
            for info in layer.parameters[name].values()
        )

    def log(self) -> None:
        for one in self.files:
            for level, line in one.lines():
                log.log(level, "%s", line)

    def __str__(self) -> str:
        return "\n".join(line for one in self.files for _, line in one.lines())


def match(shapes: Shapes, files: Sequence[tuple[LoraFile, Strength]], *, parity: str = "float32") -> Report:
    """What adding LoRAs would change, from headers alone.

    shapes: our name of every parameter of the transformer -> its shape. parity: as in ``delta.add_deltas``.
    Raises ValueError for a strength that is not a number from -10 to 10, and LoraError for a file that was made for
    another generation of LTX, that changes weights of other shapes, or that fits no layer.
    """
    return Report(tuple(_match(shapes, file, strength, parity) for file, strength in files))


def _match(shapes: Shapes, file: LoraFile, strength: Strength, parity: str) -> FileReport:
    for one in (strength.video, strength.audio):
        check_strength(file.path, one)
    origin = _origin(file)
    ours = generation(shapes)
    if ours is not None and origin and ours not in origin:
        raise LoraError(f"{file.path}: a LoRA for {' or '.join(origin)}, this model is {ours}. {FITS}.")
    parameters = {name: layer for layer in file.layers.values() for name in layer.parameters if name in shapes}
    skipped = dict(file.skipped)
    for layer in file.layers.values():
        if not layer.parameters.keys() <= parameters.keys():
            known = weight_name(layer.owner) in shapes
            skipped[layer.name] = "this layer has no bias in this model" if known else "this model has no such layer"
    wrong = [text for name, layer in parameters.items() for text in _misfit(layer, name, tuple(shapes[name]))]
    if wrong:
        looks = f" It looks like a LoRA for {' or '.join(origin)}." if origin else ""
        raise LoraError(f"{file.path}: a LoRA for a model of other sizes: {first(wrong, '; ')}.{looks} {FITS}.")
    matched = tuple(dict.fromkeys(layer.owner for layer in parameters.values()))
    if not matched:
        names = quoted([layer.name for layer in file.layers.values()])
        raise LoraError(
            f"{file.path}: none of its {len(file.layers)} layers is in this model: it changes {names}. {FITS}."
        )
    if parity == "ltx-core":
        _check_ltx_core(file, matched)
    return FileReport(file, strength, matched, MappingProxyType(parameters), MappingProxyType(skipped))


def _misfit(layer: LoraLayer, name: str, here: tuple[int, ...]) -> list[str]:
    """How a layer's change does not fit the model's parameter of that name; empty when it does."""
    if name == weight_name(layer.owner):
        what, wanted = "weight", [layer.shape, layer.reshape or layer.shape]
    else:
        what, wanted = "bias", [info.shape for info in layer.bias.values()]
    other = next((shape for shape in wanted if shape != here), None)
    return [] if other is None else [f"{shown(layer.name)} changes a {what} {list(other)}, here it is {list(here)}"]


def _origin(file: LoraFile) -> tuple[str, ...]:
    shapes = {owner: layer.shape or () for owner, layer in file.layers.items()}
    return made_for(shapes, ModelVersion.from_metadata(file.checkpoint.metadata))


def _check_ltx_core(file: LoraFile, matched: Sequence[str]) -> None:
    unknown = [file.layers[owner].name for owner in matched if not ltx_core_knows(file.layers[owner])]
    if unknown:
        raise LoraError(
            f"{file.path}: ltx-core adds plain pairs of factors only, and this file has others: {quoted(unknown)}. "
            "Use the numerics float32."
        )
