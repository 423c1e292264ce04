"""Strict reading of the JSON configuration that checkpoints carry in their metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A checkpoint's configuration has a value that this engine does not support."""


_REQUIRED = object()


@dataclass(frozen=True)
class Section:
    """One section of a checkpoint's configuration; every read is checked and every error names the key.

    name: dotted path of the section as it stands in the file, for messages.
    """

    name: str
    values: Mapping[str, Any]

    def __post_init__(self):
        if not isinstance(self.values, Mapping):
            raise ConfigError(f"config section {self.name!r} must be an object, found {type(self.values).__name__}")

    def has(self, key: str) -> bool:
        return key in self.values

    def section(self, key: str, default: Any = _REQUIRED) -> Section:
        """The sub-section ``key``; a missing one is an error unless ``default`` is a mapping to use instead."""
        return Section(f"{self.name}.{key}", self._get(key, default))

    def integer(self, key: str, default: Any = _REQUIRED, *, low: int = 1, high: int = 1_000_000) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise ConfigError(f"{self.name}.{key} must be a whole number, found {value!r}")
        if not low <= value <= high:
            raise ConfigError(f"{self.name}.{key} must be between {low} and {high}, found {value!r}")
        return int(value)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) > 1e12:
            raise ConfigError(f"{self.name}.{key} must be a finite number, found {value!r}")
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.name}.{key} must be true or false, found {value!r}")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self.name}.{key} must be a string, found {value!r}")
        return value

    def integers(self, key: str, default: Any = _REQUIRED, *, length: int | None = None) -> tuple[int, ...]:
        """A list of whole numbers from 0 to 1,000,000, at most 64 of them (exactly ``length`` when given)."""
        value = self._get(key, default)
        plain = isinstance(value, list | tuple) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and v == int(v) and 0 <= v <= 1_000_000
            for v in value
        )
        if not plain or len(value) > 64 or (length is not None and len(value) != length):
            expected = "whole numbers" if length is None else f"{length} whole numbers"
            raise ConfigError(f"{self.name}.{key} must be a list of {expected}, found {value!r}")
        return tuple(int(v) for v in value)

    def only(self, key: str, *allowed: Any, default: Any = _REQUIRED) -> Any:
        """The value of a key that has few legal values; an absent key counts as ``default`` or the first of them."""
        value = self._get(key, allowed[0] if default is _REQUIRED else default)
        if value not in allowed:
            legal = " or ".join(repr(a) for a in allowed)
            raise ConfigError(f"{self.name}.{key} is {value!r}; this engine supports {legal}")
        return value

    def raw(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value as it stands, for shapes that the typed readers do not cover."""
        return self._get(key, default)

    def _get(self, key: str, default: Any) -> Any:
        if key in self.values:
            return self.values[key]
        if default is _REQUIRED:
            raise ConfigError(f"{self.name}.{key} is missing")
        return default
