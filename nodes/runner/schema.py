"""What a V1 node class declares, in one form for validation, execution and options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NodeClass = Any  # a V1 node class is known by its attributes only
NodeTable = Mapping[str, NodeClass]
Prompt = dict[str, dict[str, Any]]

CONSTANTS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@dataclass(frozen=True)
class Input:
    """One declared input. ``type`` is a string, or the list of choices in the older combo form."""

    name: str
    type: Any
    options: Mapping[str, Any]
    required: bool

    @property
    def config(self) -> tuple[Any, Mapping[str, Any]]:
        return (self.type, self.options)

    @property
    def choices(self) -> list[Any] | None:
        """The legal values of a combo, ``None`` for other types."""
        if isinstance(self.type, list):
            return self.type
        return list(self.options.get("options", [])) if self.type == "COMBO" else None

    @property
    def is_socket(self) -> bool:
        """Whether only a link can feed it."""
        return isinstance(self.type, str) and not {part.strip() for part in self.type.split(",")} & {*CONSTANTS, "*"}

    @property
    def lazy(self) -> bool:
        return bool(self.options.get("lazy"))

    @property
    def raw_link(self) -> bool:
        return bool(self.options.get("rawLink"))


def inputs_of(node: NodeClass) -> dict[str, Input]:
    """The required and optional inputs of a node class, in declared order."""
    declared = node.INPUT_TYPES()
    return {
        name: Input(name, entry[0], entry[1] if len(entry) > 1 else {}, category == "required")
        for category in ("required", "optional")
        for name, entry in declared.get(category, {}).items()
    }


def hidden_of(node: NodeClass) -> dict[str, str]:
    """Parameter name to token, such as ``{"unique_id": "UNIQUE_ID"}``."""
    return dict(node.INPUT_TYPES().get("hidden", {}))


def is_link(value: Any) -> bool:
    """Whether a JSON value is a link ``["node id", slot]``."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and is_slot(value[1])


def is_slot(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def named_parameters(function: Callable[..., Any]) -> tuple[set[str], bool]:
    """The parameter names of a bound method, and whether it takes any keyword."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def title_of(node: Mapping[str, Any]) -> str | None:
    """The title that the user gave to a node of a prompt."""
    meta = node.get("_meta")
    return meta.get("title") if isinstance(meta, Mapping) else None
