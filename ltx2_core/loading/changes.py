"""What a list of LoRAs does to each parameter of a network."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from .checkpoint import TensorInfo
from .lora.file import LoraFile
from .lora.layer import LoraLayer
from .lora.strength import Strength


@dataclass(frozen=True)
class Adapter:
    """A LoRA and how strongly it counts in each stream. parity: its arithmetic, as in ``lora.delta``."""

    file: LoraFile = field(repr=False)
    strength: Strength
    parity: str = "float32"


Adapters = tuple[Adapter, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Change:
    """What one LoRA does to one parameter. infos: its tensors in the file, by role."""

    file: LoraFile
    layer: LoraLayer
    infos: Mapping[str, TensorInfo]
    strength: float


@dataclass(frozen=True, eq=False, slots=True)
class Changes:
    """What all LoRAs do to one parameter, in the order of the list.

    key: equal for lists that make the same value. sources: the files that the changes come from.
    low_rank: whether branches beside the weight could do all of it. parity: their arithmetic.
    """

    items: tuple[Change, ...] = ()
    key: tuple[Hashable, ...] = ()
    sources: tuple[Hashable, ...] = ()
    low_rank: bool = True
    parity: str = "float32"


NO_CHANGES = Changes()


@lru_cache(maxsize=8)
def changes_by_parameter(adapters: Adapters) -> Mapping[str, Changes]:
    """Name of a parameter of the network -> its changes; strength 0 changes nothing."""
    found: dict[str, list[Change]] = {}
    low_rank: dict[str, bool] = {}
    for adapter in adapters:
        for layer in adapter.file.layers.values():
            strength = adapter.strength.of(layer.owner)
            if strength:
                for name, infos in layer.parameters.items():
                    found.setdefault(name, []).append(Change(adapter.file, layer, infos, strength))
                    beside = layer.low_rank and infos is layer.tensors
                    low_rank[name] = low_rank.get(name, True) and beside
    parity = adapters[0].parity if adapters else "float32"
    identities = {id(adapter.file): adapter.file.checkpoint.identity for adapter in adapters}
    return {
        name: Changes(
            items=tuple(items),
            key=(parity, *((identities[id(item.file)], item.strength) for item in items)),
            sources=tuple(identities[id(item.file)] for item in items),
            low_rank=low_rank[name],
            parity=parity,
        )
        for name, items in found.items()
    }
