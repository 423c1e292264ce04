"""Runs a validated prompt: from the output nodes backwards, each node once, values freed after their last use.

No value outlives a run, so there is no cache and ``IS_CHANGED`` has nothing to decide. Not supported, as the pack's
nodes do not use them: ``expand`` (sub-graphs made at run time) and ``ExecutionBlocker``.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ltx2_core.host import use_host
from ...ltx2_core.standalone import StandaloneHost
from ..links import MODEL
from .schema import Input, NodeClass, NodeTable, Prompt, hidden_of, inputs_of, is_link, title_of

_LOG = logging.getLogger("ltx2.runner")

Event = Callable[..., None]
FILE_LISTS = ("images", "gifs", "videos", "audio", "files")


class NodeFailed(RuntimeError):
    """A node raised, or returned what it must not. The cause is chained; of one elsewhere there is the name of its type."""

    def __init__(self, node_id: str, class_type: str, title: str | None, reason: str, cause_type: str | None = None):
        self.node_id, self.class_type, self.title, self.reason = node_id, class_type, title, reason
        self._cause_type = cause_type
        name = class_type if title in (None, class_type) else f"{class_type} {title!r}"
        super().__init__(f"node {node_id} ({name}): {reason}")

    @property
    def cause_type(self) -> str:
        return self._cause_type or type(self.__cause__ or self).__name__


@dataclass(frozen=True)
class RunResult:
    """outputs: ``ui`` dict of each node that gave one. executed: node ids in order. files: what was saved."""

    outputs: dict[str, dict[str, Any]]
    executed: list[str]
    files: list[Path]


class DynamicPrompt:
    """The value of the hidden input ``DYNPROMPT``; without expansion it equals the prompt."""

    def __init__(self, prompt: Prompt):
        self._prompt = prompt

    def get_original_prompt(self) -> Prompt:
        return self._prompt

    def get_node(self, node_id: str) -> dict[str, Any]:
        return self._prompt[node_id]

    def has_node(self, node_id: str) -> bool:
        return node_id in self._prompt

    def all_node_ids(self) -> set[str]:
        return set(self._prompt)


def execute(
    prompt: Prompt,
    nodes: NodeTable,
    host: StandaloneHost,
    extra_data: Mapping[str, Any] | None = None,
    on_event: Event | None = None,
    models: list[Any] | None = None,
) -> RunResult:
    """Run every output node of ``prompt``, which ``validate`` returned, and what they need.

    on_event: called as ``on_event("executing" | "executed" | "output", node=id, ...)``. models: takes every model that a
    node opens, for who wants them to outlive the run. Raises ``NodeFailed``, and lets ``Interrupted`` pass.
    """
    run = _Run(prompt, nodes, host, extra_data or {}, on_event or _ignore, models)
    try:
        with use_host(host), host.inference_scope():
            run.all_outputs()
    finally:
        run.close()
    return RunResult(run.outputs, run.executed, run.files)


def _ignore(type: str, **fields: Any) -> None:
    """The event sink when nobody listens."""


class _Run:
    def __init__(
        self,
        prompt: Prompt,
        nodes: NodeTable,
        host: StandaloneHost,
        extra: Mapping[str, Any],
        event: Event,
        models: list[Any] | None,
    ):
        self.outputs: dict[str, dict[str, Any]] = {}
        self.executed: list[str] = []
        self.files: list[Path] = []
        self._prompt, self._nodes, self._host, self._extra, self._event = prompt, nodes, host, extra, event
        self._models = models
        self._instances: dict[str, Any] = {}
        self._values: dict[str, list[list[Any]]] = {}
        self._done: set[str] = set()
        self._requested: dict[str, set[str]] = {}
        self._roots = [node_id for node_id in prompt if getattr(self._class(node_id), "OUTPUT_NODE", False)]
        self._consumers = self._find_consumers()
        self._loop: asyncio.AbstractEventLoop | None = None

    def all_outputs(self) -> None:
        for root in self._roots:
            self._demand(root)

    def close(self) -> None:
        self._host.current_node = None
        self._values.clear()
        if self._loop is not None:
            self._loop.close()

    # the graph

    def _class(self, node_id: str) -> NodeClass:
        return self._nodes[self._prompt[node_id]["class_type"]]

    def _links(self, node_id: str) -> list[tuple[Input, str]]:
        """(declared input, source node) of each link that must deliver a value."""
        values, declared = self._prompt[node_id].get("inputs", {}), inputs_of(self._class(node_id))
        return [
            (declared[name], value[0])
            for name, value in values.items()
            if name in declared and is_link(value) and not declared[name].raw_link
        ]

    def _find_consumers(self) -> dict[str, set[str]]:
        """For each node that an output may need: the nodes that read it."""
        consumers: dict[str, set[str]] = {root: set() for root in self._roots}
        waiting = list(self._roots)
        while waiting:
            node_id = waiting.pop()
            for _, source in self._links(node_id):
                if source not in consumers:
                    consumers[source] = set()
                    waiting.append(source)
                consumers[source].add(node_id)
        return consumers

    def _demand(self, target: str) -> None:
        stack = [target]
        while stack:
            node_id = stack[-1]
            if node_id in self._done:
                stack.pop()
                continue
            missing = self._missing(node_id) or self._newly_requested(node_id)
            if missing:
                stack += reversed(missing)
                continue
            self._run_node(node_id)
            stack.pop()

    def _missing(self, node_id: str) -> list[str]:
        requested = self._requested.get(node_id, set())
        sources = [source for field, source in self._links(node_id) if not field.lazy or field.name in requested]
        return [source for source in dict.fromkeys(sources) if source not in self._done]

    def _newly_requested(self, node_id: str) -> list[str]:
        """The sources of the lazy inputs that the node asks for now."""
        node = self._instance(node_id)
        if not hasattr(node, "check_lazy_status"):
            return []
        self._host.current_node = node_id
        asked = [
            name for names in self._call(node_id, "check_lazy_status") if isinstance(names, list) for name in names
        ]
        unready = {field.name: source for field, source in self._links(node_id) if source not in self._done}
        linkable = {name for name in inputs_of(self._class(node_id)) if name in self._prompt[node_id].get("inputs", {})}
        for name in asked:
            if name not in linkable:
                raise self._failure(node_id, f"check_lazy_status asks for {name!r}, which is not linked")
        wanted = [name for name in asked if name in unready]
        self._requested.setdefault(node_id, set()).update(wanted)
        return list(dict.fromkeys(unready[name] for name in wanted))

    def _release(self, node_id: str) -> None:
        """Drop the values that only this node was still to read, and those that only dropped nodes would have read."""
        finished = [node_id]
        while finished:
            reader = finished.pop()
            for source in {source for _, source in self._links(reader)}:
                readers = self._consumers[source]
                readers.discard(reader)
                if readers:
                    continue
                self._values.pop(source, None)
                if source not in self._done and source not in self._roots:
                    finished.append(source)

    # one node

    def _instance(self, node_id: str) -> Any:
        if node_id not in self._instances:
            self._instances[node_id] = self._guarded(node_id, self._class(node_id), {})
        return self._instances[node_id]

    def _run_node(self, node_id: str) -> None:
        node_class = self._class(node_id)
        self._host.current_node = node_id
        self._event("executing", node=node_id, class_type=self._prompt[node_id]["class_type"])
        returned = self._call(node_id, node_class.FUNCTION)
        rows, uis = self._split(node_id, returned, len(node_class.RETURN_TYPES))
        if self._consumers[node_id]:
            self._values[node_id] = _columns(rows, node_class)
            self._keep_models(node_id, node_class)
        self._done.add(node_id)
        self.executed.append(node_id)
        if uis:
            self.outputs[node_id] = {key: [entry for ui in uis for entry in ui.get(key, ())] for key in uis[0]}
            self._report_files(node_id)
        self._event("executed", node=node_id)
        self._instances.pop(node_id, None)
        self._release(node_id)

    def _keep_models(self, node_id: str, node_class: NodeClass) -> None:
        if self._models is not None:
            columns = zip(node_class.RETURN_TYPES, self._values[node_id], strict=True)
            self._models += [value for kind, values in columns if kind == MODEL for value in values]

    def _call(self, node_id: str, method: str) -> list[Any]:
        """The results of a method, called once for each item of its list inputs."""
        node = self._instance(node_id)
        arguments = self._arguments(node_id)
        if getattr(node, "INPUT_IS_LIST", False):
            calls = [arguments]
        else:
            count = max(map(len, arguments.values()), default=0)
            empty = [name for name, items in arguments.items() if count and not items]
            if empty:
                raise self._failure(node_id, f"input {empty[0]!r} received an empty list")
            calls = [{name: items[min(i, len(items) - 1)] for name, items in arguments.items()} for i in range(count)]
        results = []
        for call in calls or [{}]:
            self._host.check_interrupt()
            results.append(self._guarded(node_id, getattr(node, method), call))
        return results

    def _guarded(self, node_id: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        try:
            result = function(**arguments)
            if inspect.iscoroutine(result):
                self._loop = self._loop or asyncio.new_event_loop()
                result = self._loop.run_until_complete(result)
            return result
        except Exception as error:
            raise self._failure(node_id, str(error) or type(error).__name__) from error

    def _arguments(self, node_id: str) -> dict[str, list[Any]]:
        """Each declared and hidden input as a list; a lazy input that was not asked for is ``[None]``."""
        values, declared = self._prompt[node_id].get("inputs", {}), inputs_of(self._class(node_id))
        arguments = {}
        for name, value in values.items():
            if name not in declared:
                continue
            if is_link(value) and not declared[name].raw_link:
                source, slot = value
                arguments[name] = self._values[source][slot] if source in self._done else [None]
            else:
                arguments[name] = [value]
        hidden = {
            "UNIQUE_ID": node_id,
            "PROMPT": self._prompt,
            "DYNPROMPT": DynamicPrompt(self._prompt),
            "EXTRA_PNGINFO": self._extra.get("extra_pnginfo"),
        }
        return arguments | {name: [hidden.get(token)] for name, token in hidden_of(self._class(node_id)).items()}

    def _split(self, node_id: str, returned: list[Any], width: int) -> tuple[list[tuple[Any, ...]], list[dict]]:
        """The result tuples and the ui dicts of what a node returned."""
        rows, uis = [], []
        for value in returned:
            if isinstance(value, dict):
                if "expand" in value:
                    raise self._failure(node_id, "returned 'expand', which this runner does not support")
                if "ui" in value:
                    uis.append(value["ui"])
                value = value.get("result", ())
            row = () if value is None else value
            if not isinstance(row, tuple | list) or len(row) != width:
                shown = f"{len(row)} values" if isinstance(row, tuple | list) else type(row).__name__
                raise self._failure(node_id, f"returned {shown}, but declares {width} outputs")
            rows.append(tuple(row))
        return rows, uis

    def _report_files(self, node_id: str) -> None:
        folders = {"output": self._host.output_dir, "input": self._host.input_dir}
        ui = self.outputs[node_id]
        for entry in (entry for key in FILE_LISTS for entry in ui.get(key, ())):
            if not isinstance(entry, Mapping) or "filename" not in entry:
                continue
            place, subfolder = entry.get("type", "output"), entry.get("subfolder", "")
            path = (folders.get(place) or self._host.temp_dir()) / subfolder / entry["filename"]
            self.files.append(path)
            self._event("output", node=node_id, path=str(path), folder=place)

    def _failure(self, node_id: str, reason: str) -> NodeFailed:
        node = self._prompt[node_id]
        return NodeFailed(node_id, node["class_type"], title_of(node), reason)


def _columns(rows: list[tuple[Any, ...]], node_class: NodeClass) -> list[list[Any]]:
    """One list a slot: the items of all calls, spread where ``OUTPUT_IS_LIST`` says so."""
    width = len(node_class.RETURN_TYPES)
    spread = getattr(node_class, "OUTPUT_IS_LIST", (False,) * width)
    return [
        [item for row in rows for item in row[slot]] if spread[slot] else [row[slot] for row in rows]
        for slot in range(width)
    ]
