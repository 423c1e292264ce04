"""LoRA files: what their headers say they change."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ..checkpoint import Checkpoint, TensorInfo, read_header
from .errors import FITS, LoraError, lora_error, quoted, shown
from .layer import LoraLayer, read_layers
from .names import OTHER_KINDS, module_name, split, why_not
from .origin import other_model

_MAX_FACTOR = 64


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What the checked header of a LoRA file says; no data but the alphas.

    layers: our name of a layer or table ("blocks.3.video.attn1.to_q") -> what changes in it.
    skipped: layer or tensor in the file -> why it is not used.
    reference_downscale_factor, reference_temporal_scale_factor: how much smaller than the output, and how many times
    fewer frames, the reference video of an IC-LoRA is. hdr: what the metadata say of an HDR transform.
    """

    checkpoint: Checkpoint = field(repr=False)
    layers: Mapping[str, LoraLayer] = field(repr=False)
    skipped: Mapping[str, str] = field(repr=False)
    reference_downscale_factor: int = 1
    reference_temporal_scale_factor: int = 1
    hdr: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks of the layers, ascending."""
        return tuple(sorted({layer.rank for layer in self.layers.values() if layer.rank is not None}))

    @property
    def titles(self) -> tuple[str, ...]:
        """The different algebras of the layers, the most frequent first."""
        return tuple(title for title, _ in Counter(layer.title for layer in self.layers.values()).most_common())


def read_lora(path: Path) -> LoraFile:
    """Read what a LoRA file is for: its header, and the few numbers (alphas) that are part of the layers' formulas.

    Raises CheckpointError for an unsound file, and LoraError for one with incomplete layers, with tensors that do not
    belong together, of an algebra that is not known, or without any layer of an LTX-2 transformer.
    """
    checkpoint = read_header(path)
    by_layer, skipped = _by_layer(checkpoint)
    named: dict[str, tuple[str, Mapping[str, TensorInfo]]] = {}
    for name, parts in by_layer.items():
        owner = module_name(name)
        if owner is None:
            skipped[name] = why_not(name)
        elif owner in named:
            twice = f"{shown(named[owner][0])} and {shown(name)} are the same layer"
            raise lora_error(checkpoint, twice, "use another file")
        else:
            named[owner] = name, parts
    if not named:
        model = other_model(by_layer)
        looks = checkpoint.looks_like() if model is None else f"a LoRA of {model}"
        raise LoraError(
            f"{checkpoint.path}: no LoRA of an LTX-2 transformer: it looks like {looks}, "
            f"with names that begin with {_beginnings(checkpoint)}. {FITS}."
        )
    return LoraFile(
        checkpoint=checkpoint,
        layers=MappingProxyType(read_layers(checkpoint, named)),
        skipped=MappingProxyType(skipped),
        reference_downscale_factor=_factor(checkpoint, "reference_downscale_factor"),
        reference_temporal_scale_factor=_factor(checkpoint, "reference_temporal_scale_factor"),
        hdr=MappingProxyType({key: text for key, text in checkpoint.metadata.items() if "hdr" in key.lower()}),
    )


def reference_factors(loras: Sequence[LoraFile]) -> tuple[int, int]:
    """The reference video's downscale and temporal factor that several LoRAs agree on; 1 where none sets any.

    Raises LoraError when two files need different ones.
    """
    return _agreed(loras, "reference_downscale_factor"), _agreed(loras, "reference_temporal_scale_factor")


def _by_layer(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, str]]:
    """The file's layers, each with its tensors by role, and tensors that are no part of a LoRA with the reason."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    skipped: dict[str, str] = {}
    for info in checkpoint.tensors.values():
        found = split(info.name)
        if found is None:
            skipped[info.name] = "neither a factor nor the alpha of a LoRA"
            continue
        name, role = found
        parts = layers.setdefault(name, {})
        # one tensor says enough of an algebra that is not known
        if parts.setdefault(role, info) is not info and role not in OTHER_KINDS:
            twice = f"{shown(parts[role].name)} and {shown(info.name)} are the same factor"
            raise lora_error(checkpoint, twice, "use another file")
    return layers, skipped


def _factor(checkpoint: Checkpoint, key: str) -> int:
    text = checkpoint.metadata.get(key, "1").strip().strip('"')
    number = re.fullmatch(r"([0-9]{1,9})(?:\.0+)?", text)
    if number is None or not 1 <= int(number[1]) <= _MAX_FACTOR:
        problem = f"its metadata says {key} = {shown(text)}"
        raise lora_error(checkpoint, problem, f"it must be a whole number from 1 to {_MAX_FACTOR}")
    return int(number[1])


def _agreed(loras: Sequence[LoraFile], key: str) -> int:
    by_value = {getattr(lora, key): lora.path.name for lora in loras if getattr(lora, key) != 1}
    if len(by_value) > 1:
        found = ", ".join(f"{name} needs {value}" for value, name in by_value.items())
        raise LoraError(f"these LoRAs need references of different {key}: {found}. Use one of them at a time.")
    return next(iter(by_value), 1)


def _beginnings(checkpoint: Checkpoint) -> str:
    counts = Counter(".".join(name.split(".")[:2]) for name in checkpoint.tensors)
    return quoted([beginning for beginning, _ in counts.most_common()])
