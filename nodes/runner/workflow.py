"""Reading a workflow file: size, JSON, and the API format's outer shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .schema import Prompt

MAX_BYTES = 64 * 2**20
MAX_NODES = 10_000


class WorkflowError(ValueError):
    """A workflow that cannot run. ``body`` has the shape of ComfyUI's answer to an invalid prompt."""

    def __init__(self, type: str, message: str, details: str = "", *, node_errors: dict | None = None, **extra: Any):
        super().__init__(f"{message}: {details}" if details else message)
        self.body: dict[str, Any] = {
            "error": {"type": type, "message": message, "details": details, "extra_info": extra},
            "node_errors": node_errors or {},
        }

    @property
    def type(self) -> str:
        return self.body["error"]["type"]

    def lines(self) -> list[str]:
        """The problem of the whole, then one line for each problem of a node."""
        lines = [str(self)] if not self.body["node_errors"] else [self.body["error"]["message"]]
        for node_id, report in self.body["node_errors"].items():
            node = f"node {node_id} ({report['class_type']})"
            lines += [f"{node}: {problem}" for problem in _said_once(report["errors"])]
        return lines


def _said_once(problems: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each problem; a reason that ComfyUI repeats for every input that a check reads is said once."""
    named: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        name, reason = "", problem["details"]
        if problem["type"] == "custom_validation_failed":
            name, _, reason = reason.partition(" - ")
        named.setdefault((problem["message"], reason), []).append(name)
    return [
        ": ".join(filter(None, (message, ", ".join(dict.fromkeys(names)), reason)))
        for (message, reason), names in named.items()
    ]


@dataclass(frozen=True)
class Workflow:
    """A prompt in API format and what came with it (``extra_pnginfo`` holds the UI workflow)."""

    prompt: Prompt
    extra_data: dict[str, Any] = field(default_factory=dict)


def read_workflow(path: Path) -> Workflow:
    """The workflow in ``path``. Raises ``WorkflowError`` when it is unreadable, too large, or in UI format."""
    return decode_workflow(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """What ``path`` holds. Raises ``WorkflowError`` when it is unreadable or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise WorkflowError("invalid_prompt", "Workflow file cannot be read", f"{path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise WorkflowError("invalid_prompt", "Workflow file is too large", f"{path}: more than {MAX_BYTES} bytes")
    return data


def decode_workflow(data: bytes, path: Path) -> Workflow:
    """The workflow that a file's bytes hold; ``path`` is for messages. Raises ``WorkflowError``."""
    try:
        return parse_workflow(data.decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise WorkflowError("invalid_prompt", "Workflow file cannot be read", f"{path}: {error}") from error


def find_workflows(paths: Sequence[Path]) -> list[Path]:
    """The files among ``paths``, and the .json files of the folders among them. Raises WorkflowError for an empty folder."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(entry for entry in path.glob("*.json") if entry.is_file()) if path.is_dir() else [path]
        if not inside:
            raise WorkflowError("no_prompt", "Folder without workflows", f"{path}: no file in it ends in .json")
        found += inside
    return found


def parse_workflow(text: str, path: Path = Path("workflow.json")) -> Workflow:
    """A workflow from its JSON text; ``path`` is for messages and for finding the API twin of a UI file."""
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}: {error.msg}"
        raise WorkflowError("invalid_prompt", "Workflow file is not valid JSON", where) from error
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise WorkflowError("invalid_prompt", "Workflow file is not valid JSON", f"{path}: {reason}") from error
    if isinstance(data, dict) and isinstance(data.get("nodes"), list):
        raise WorkflowError("invalid_prompt", "Workflow file is in ComfyUI's UI format, not API format", _twin(path))
    extra: Any = {}
    if isinstance(data, dict) and "prompt" in data and "class_type" not in _mapping(data["prompt"]):
        data, extra = data["prompt"], data.get("extra_data", {})
    if not isinstance(extra, dict):
        raise WorkflowError("invalid_prompt", "extra_data must be an object", f"{path}: found {type(extra).__name__}")
    return Workflow(_checked_shape(data, path), extra)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return result


def _twin(path: Path) -> str:
    twin = path.parent / "api" / path.name
    if twin.is_file():
        return f"{path}: use {twin}"
    return f"{path}: in ComfyUI choose File > Export (API), or use one of the files in workflows/api"


def _checked_shape(prompt: Any, path: Path) -> Prompt:
    if not isinstance(prompt, dict) or not prompt:
        raise WorkflowError("no_prompt", "No prompt provided", f"{path}: expected an object with one entry a node")
    if len(prompt) > MAX_NODES:
        raise WorkflowError("invalid_prompt", "Too many nodes", f"{path}: {len(prompt)}, at most {MAX_NODES} are run")
    for node_id, node in prompt.items():
        problem = _shape_problem(node)
        if problem:
            raise WorkflowError("invalid_prompt", "Node has the wrong form", f"{path}, node {node_id}: {problem}")
    return prompt


def _shape_problem(node: Any) -> str | None:
    if not isinstance(node, dict):
        return f"expected an object with class_type and inputs, found {type(node).__name__}"
    if not isinstance(node.get("inputs", {}), dict):
        return f"inputs must be an object, found {type(node['inputs']).__name__}"
    if not isinstance(node.get("class_type", ""), str | None):
        return f"class_type must be a text, found {type(node['class_type']).__name__}"
    return None
