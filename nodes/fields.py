"""How the nodes declare their inputs: every input has a type, a default, a range and a tooltip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Field = tuple[str, dict[str, Any]]


def INT(default: int, min: int, max: int, tooltip: str, step: int = 1, **more: Any) -> Field:
    """A whole number from ``min`` to ``max``; ``more`` are further widget options such as ``advanced=True``."""
    return ("INT", {"default": default, "min": min, "max": max, "step": step, "tooltip": tooltip, **more})


def FLOAT(default: float, min: float, max: float, tooltip: str, step: float = 0.01, **more: Any) -> Field:
    """A number from ``min`` to ``max``."""
    return ("FLOAT", {"default": default, "min": min, "max": max, "step": step, "tooltip": tooltip, **more})


def STRING(default: str, tooltip: str, multiline: bool = False, **more: Any) -> Field:
    """A text, on one line or on several."""
    return ("STRING", {"default": default, "multiline": multiline, "tooltip": tooltip, **more})


def BOOL(default: bool, tooltip: str, **more: Any) -> Field:
    """A switch."""
    return ("BOOLEAN", {"default": default, "tooltip": tooltip, **more})


def COMBO(options: Sequence[str], tooltip: str, default: str | None = None, **more: Any) -> Field:
    """A choice from ``options``; the default is the first of them unless given (none when the list is empty)."""
    choices = list(options)
    chosen = default if default is not None else next(iter(choices), None)
    preset = {} if chosen is None else {"default": chosen}
    return ("COMBO", {"options": choices, **preset, "tooltip": tooltip, **more})


def LINK(type: str, tooltip: str, **more: Any) -> Field:
    """A socket: the value comes from another node."""
    return (type, {"tooltip": tooltip, **more})
