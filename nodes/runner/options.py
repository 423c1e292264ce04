"""``--set NODE.input=value``: constants of a workflow, changed from the command line."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .schema import Input, NodeTable, Prompt, inputs_of, is_link, title_of

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


class OptionError(ValueError):
    """A ``--set`` that names no node or input, or a value that does not fit."""


@dataclass(frozen=True)
class Setting:
    """One ``--set``, resolved."""

    node_id: str
    input: Input
    value: Any


def apply_settings(prompt: Prompt, nodes: NodeTable, texts: Sequence[str]) -> Prompt:
    """A copy of ``prompt`` with the settings applied; unknown names raise ``OptionError``.

    A node class with ``fill(name, value) -> dict`` (a preset that stands for several numbers) fills its unlinked inputs
    first, as the widget does in the browser; then the settings themselves, in order, so that an explicit one wins.
    """
    prompt = copy.deepcopy(prompt)
    settings = [parse_setting(text, prompt, nodes) for text in texts]
    for setting in settings:
        node = prompt[setting.node_id]
        fill = getattr(nodes[node["class_type"]], "fill", None)
        filled = fill(setting.input.name, setting.value) if fill else {}
        inputs = node.setdefault("inputs", {})
        inputs.update({name: value for name, value in filled.items() if not is_link(inputs.get(name))})
    for setting in settings:
        prompt[setting.node_id].setdefault("inputs", {})[setting.input.name] = setting.value
    return prompt


def parse_setting(text: str, prompt: Prompt, nodes: NodeTable) -> Setting:
    """``NODE.input=value``, where NODE is an id, or a class or title that only one node has."""
    target, equals, raw = text.partition("=")
    if not equals or "." not in target:
        raise OptionError(f"--set {text!r} must have the form NODE.input=value")
    dots = [place for place, letter in enumerate(target) if letter == "."]
    splits = [(target[:dot], target[dot + 1 :]) for dot in dots]
    known = [(name, field) for name, field in splits if _matches(name, prompt)]
    if not known:
        raise OptionError(f"--set {text!r}: no node is called {splits[-1][0]!r}. {_node_list(splits[-1][0], prompt)}")
    for name, field in known:
        node_id = _only_match(name, prompt, text)
        declared = _declared(node_id, prompt, nodes)
        if field in declared:
            return Setting(node_id, declared[field], _value(raw, declared[field], text))
    name, field = known[-1]
    inputs = _declared(_only_match(name, prompt, text), prompt, nodes)
    legal = ", ".join(key for key, entry in inputs.items() if not entry.is_socket) or "none that can be set"
    raise OptionError(f"--set {text!r}: node {name!r} has no input {field!r}. It has: {legal}")


def _declared(node_id: str, prompt: Prompt, nodes: NodeTable) -> dict[str, Input]:
    class_type = str(prompt[node_id].get("class_type"))
    if class_type not in nodes:
        raise OptionError(f"node {node_id} has the class {class_type!r}, which is not known here")
    return inputs_of(nodes[class_type])


def _matches(name: str, prompt: Prompt) -> list[str]:
    if name in prompt:
        return [name]
    by_class = [node_id for node_id, node in prompt.items() if node.get("class_type") == name]
    return by_class or [node_id for node_id, node in prompt.items() if title_of(node) == name]


def _only_match(name: str, prompt: Prompt, text: str) -> str:
    found = _matches(name, prompt)
    if len(found) > 1:
        nodes = ", ".join(f"{node_id} ({title_of(prompt[node_id]) or 'untitled'})" for node_id in found)
        raise OptionError(f"--set {text!r}: {name!r} stands for nodes {nodes}; use an id or a title")
    return found[0]


def _node_list(name: str, prompt: Prompt) -> str:
    names = [f"{node_id} ({title_of(node) or node.get('class_type')})" for node_id, node in prompt.items()]
    classes = {str(node.get("class_type")) for node in prompt.values()}
    close = difflib.get_close_matches(name, [*prompt, *classes], n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    more = f" and {len(names) - 40} more" if len(names) > 40 else ""
    return f"{hint}The workflow has: {', '.join(names[:40])}{more}"


def _value(raw: str, field: Input, text: str) -> Any:
    """The value of a text for an input: JSON where the type is not a text, the text itself where it is."""
    if field.is_socket:
        raise OptionError(f"--set {text!r}: {field.name!r} takes a link of type {field.type}, not a value")
    if field.type == "BOOLEAN":
        return _switch(raw, text)
    parsed = _json_or_text(raw)
    if field.type == "STRING":
        return parsed if isinstance(parsed, str) else raw
    if isinstance(parsed, list):
        return {"__value__": parsed}  # a bare list would be taken for a link
    if field.choices is not None:
        return parsed if parsed in field.choices and raw not in field.choices else raw
    return parsed


def _switch(raw: str, text: str) -> bool:
    if raw.lower() not in TRUE + FALSE:
        raise OptionError(f"--set {text!r}: a switch is {', '.join(TRUE)} or {', '.join(FALSE)}")
    return raw.lower() in TRUE


def _json_or_text(raw: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw
