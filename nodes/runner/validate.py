"""ComfyUI's validation of a prompt: the same checks, error types and JSON shape, all problems collected.

Stricter than ComfyUI in four points: one invalid output fails the run, NaN and infinity are refused, so are constants
where only a link fits, and negative output slots.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

from .schema import Input, NodeClass, NodeTable, Prompt, hidden_of, inputs_of, is_slot, named_parameters, title_of
from .workflow import WorkflowError

_LOG = logging.getLogger("ltx2.runner")

Problem = dict[str, Any]


def validate(prompt: Prompt, nodes: NodeTable) -> Prompt:
    """A copy of ``prompt`` with every constant converted to its declared type. Raises ``WorkflowError``."""
    outputs = _find_outputs(prompt, nodes)
    run = _Validation(copy.deepcopy(prompt), nodes)
    node_errors: dict[str, dict[str, Any]] = {}
    details = []
    for output in outputs:
        if run.check_output(output):
            continue
        details += [f"{problem['message']}: {problem['details']}" for problem in run.problems[output]]
        for node_id, problems in run.problems.items():
            if problems:
                report = {"errors": problems, "dependent_outputs": [], "class_type": prompt[node_id]["class_type"]}
                node_errors.setdefault(node_id, report)["dependent_outputs"].append(output)
    if node_errors:
        raise WorkflowError(
            "prompt_outputs_failed_validation",
            "Prompt outputs failed validation",
            "\n".join(details),
            node_errors=node_errors,
        )
    return run.prompt


def _find_outputs(prompt: Prompt, nodes: NodeTable) -> list[str]:
    for node_id, node in prompt.items():
        class_type, title = node.get("class_type"), title_of(node)
        if class_type is None:
            message = (
                f"Node '{title or f'ID #{node_id}'}' has no class_type. "
                f"The workflow may be corrupted or a custom node is missing."
            )
        elif class_type not in nodes:
            message = f"Node '{title or class_type}' not found. The custom node may not be installed."
        else:
            continue
        extra: dict[str, Any] = {"node_id": node_id, "class_type": class_type, "node_title": title or class_type}
        raise WorkflowError("missing_node_type", message, f"Node ID '#{node_id}'", **extra)
    outputs = [node_id for node_id, node in prompt.items() if getattr(nodes[node["class_type"]], "OUTPUT_NODE", False)]
    if not outputs:
        raise WorkflowError("prompt_no_outputs", "Prompt has no outputs")
    return outputs


class _Validation:
    """Depth-first check of the nodes that an output needs; each node once."""

    def __init__(self, prompt: Prompt, nodes: NodeTable):
        self.prompt = prompt
        self.problems: dict[str, list[Problem]] = {}
        self._nodes = nodes
        self._valid: dict[str, bool] = {}
        self._path: list[str] = []

    def check_output(self, node_id: str) -> bool:
        try:
            return self._check(node_id)
        except Exception as error:
            extra = {"exception_type": type(error).__name__, "traceback": []}
            problem = _problem("exception_during_validation", "Exception when validating node", _reason(error), **extra)
            self._set(node_id, False, [problem])
            return False

    def _set(self, node_id: str, valid: bool, problems: list[Problem]) -> bool:
        self._valid[node_id], self.problems[node_id] = valid, problems
        return valid

    def _check(self, node_id: str) -> bool:
        if node_id in self._valid:
            return self._valid[node_id]
        if node_id in self._path:
            return self._report_cycle(node_id)
        node = self.prompt[node_id]
        values, node_class = node.setdefault("inputs", {}), self._nodes[node["class_type"]]
        declared = inputs_of(node_class)
        validator = getattr(node_class, "VALIDATE_INPUTS", None)
        named, any_name = named_parameters(validator) if validator else (set(), False)
        problems: list[Problem] = []
        sources_valid = True
        received: dict[str, Any] = {}

        for field in declared.values():
            if field.name not in values:
                if field.required:
                    problems.append(_input_problem("required_input_missing", "Required input is missing", field))
            elif isinstance(values[field.name], list):
                problem, source_valid = self._check_link(node_id, field, received, "input_types" in named)
                problems += [problem] if problem else []
                sources_valid &= source_valid
            else:
                bounded = field.name not in named and not any_name
                problem = _convert(values, field) or (_check_range(values[field.name], field) if bounded else None)
                problems += [problem] if problem else []
        if validator:
            problems += _custom(validator, named, any_name, values, node_class, received)
        self._warn_of_unknown(node_id, values, declared)
        # a cycle through this node has already left a problem here
        problems = self.problems.get(node_id, []) + problems
        return self._set(node_id, sources_valid and not problems, problems)

    def _check_link(
        self, node_id: str, field: Input, received: dict[str, Any], any_type: bool
    ) -> tuple[Problem | None, bool]:
        """The problem of this link, if any, and whether the node at its other end is valid."""
        link = self.prompt[node_id]["inputs"][field.name]
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return _input_problem("bad_linked_input", message, field, received_value=link), True
        source = link[0]
        received[field.name] = self._type_of(field, *link)
        if not any_type and not _types_meet(received[field.name], field.type):
            details = f"{field.name}, received_type({received[field.name]}) mismatch input_type({field.type})"
            extra = {"received_type": received[field.name], "linked_node": link}
            message = "Return type mismatch between linked nodes"
            return _input_problem("return_type_mismatch", message, field, details, **extra), True
        self._path.append(node_id)
        try:
            return None, self._check(source)
        except Exception as error:
            extra = {
                "input_name": field.name,
                "input_config": field.config,
                "exception_message": _reason(error),
                "exception_type": type(error).__name__,
                "traceback": [],
                "linked_node": link,
            }
            message = "Exception when validating inner node"
            problem = _problem("exception_during_inner_validation", message, _reason(error), **extra)
            self._set(source, False, [problem])
            return None, False
        finally:
            self._path.pop()

    def _type_of(self, field: Input, source: Any, slot: Any) -> Any:
        """The type at the other end of a link. A dangling link raises, as in ComfyUI."""
        if not isinstance(source, str) or source not in self.prompt:
            raise LookupError(f"input {field.name!r} links to node {source!r}, which is not in the workflow")
        class_type = self.prompt[source]["class_type"]
        types = self._nodes[class_type].RETURN_TYPES
        if not is_slot(slot) or slot >= len(types):
            raise LookupError(
                f"input {field.name!r} links to output {slot!r} of node {source} ({class_type}), "
                f"which has {len(types)} outputs, counted from 0"
            )
        return types[slot]

    def _report_cycle(self, node_id: str) -> bool:
        path = [*self._path[self._path.index(node_id) :], node_id]
        cycle = list(dict.fromkeys(path))
        details = " -> ".join(f"{step} ({self.prompt[step]['class_type']})" for step in path)
        for member in cycle:
            extra = {"node_id": member, "cycle_nodes": cycle}
            self._set(member, False, [_problem("dependency_cycle", "Dependency cycle detected", details, **extra)])
        return False

    def _warn_of_unknown(self, node_id: str, values: dict[str, Any], declared: dict[str, Input]) -> None:
        unknown = [name for name in values if name not in declared]
        if unknown:
            class_type = self.prompt[node_id]["class_type"]
            _LOG.warning("node %s (%s) has no input %s; ignored", node_id, class_type, ", ".join(map(repr, unknown)))


def _problem(type: str, message: str, details: str, **extra: Any) -> Problem:
    return {"type": type, "message": message, "details": details, "extra_info": extra}


def _input_problem(type: str, message: str, field: Input, details: str | None = None, **extra: Any) -> Problem:
    config = {} if type == "required_input_missing" else {"input_config": field.config}
    return _problem(type, message, field.name if details is None else details, input_name=field.name, **config | extra)


def _reason(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error) or type(error).__name__


def _types_meet(received: Any, wanted: Any) -> bool:
    if received == wanted or received == "*" or wanted == "*":
        return True
    if isinstance(received, list):
        return wanted == "COMBO"
    if not isinstance(received, str) or not isinstance(wanted, str):
        return False
    have, want = ({part.strip() for part in types.split(",")} for types in (received, wanted))
    return bool(have & want or "*" in have | want)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a finite number")
    return number


_CONVERT: dict[str, Callable[[Any], Any]] = {"INT": int, "FLOAT": _finite, "STRING": str, "BOOLEAN": bool}


def _convert(values: dict[str, Any], field: Input) -> Problem | None:
    """Unwrap and convert a constant in place; the problem if it cannot be converted."""
    value = values[field.name]
    if isinstance(value, dict) and "__value__" in value:
        value = values[field.name] = value["__value__"]
    try:
        if isinstance(field.type, str) and field.type in _CONVERT:
            values[field.name] = _CONVERT[field.type](value)
        elif field.is_socket and not (value is None and not field.required):
            raise TypeError(f"it takes a link to a node's output of type {field.type}, not a constant")
    except (TypeError, ValueError, OverflowError) as error:
        return _input_problem(
            "invalid_input_type",
            f"Failed to convert an input value to a {field.type} value",
            field,
            f"{field.name}, {value}, {error}",
            received_value=value,
            exception_message=str(error),
        )
    return None


def _check_range(value: Any, field: Input) -> Problem | None:
    low, high = field.options.get("min"), field.options.get("max")
    if low is not None and value < low:
        message = f"Value {value} smaller than min of {low}"
        return _input_problem("value_smaller_than_min", message, field, received_value=value)
    if high is not None and value > high:
        message = f"Value {value} bigger than max of {high}"
        return _input_problem("value_bigger_than_max", message, field, received_value=value)
    return None if field.choices is None else _check_choice(value, field, field.choices)


def _check_choice(value: Any, field: Input, choices: list[Any]) -> Problem | None:
    several = field.options.get("multiselect", False) and isinstance(value, list)
    wrong = [entry for entry in (value if several else [value]) if entry not in choices]
    if not wrong:
        return None
    long = len(choices) > 20  # the lists of model files are long, and the message may go over the network
    legal = f"(list of length {len(choices)})" if long else str(choices)
    details = f"{field.name}: {', '.join(map(repr, wrong))} not in {legal}"
    extra = {"input_config": None} if long else {}
    return _input_problem("value_not_in_list", "Value not in list", field, details, received_value=value, **extra)


def _custom(
    validator: Callable[..., Any],
    named: set[str],
    any_name: bool,
    values: dict[str, Any],
    node_class: NodeClass,
    received: dict[str, Any],
) -> list[Problem]:
    """The problems that the node's own ``VALIDATE_INPUTS`` finds: one for each input that it was given."""
    known = {**inputs_of(node_class), **hidden_of(node_class)}
    given = {
        name: None if isinstance(value, list) else value
        for name, value in values.items()
        if name in known and (name in named or any_name)
    }
    if "input_types" in named:
        given["input_types"] = received
    verdict = validator(**given)
    if inspect.iscoroutine(verdict):
        verdict = asyncio.run(verdict)
    if verdict is True:
        return []
    reason = "" if verdict is False else f" - {verdict}"
    return [
        _problem("custom_validation_failed", "Custom validation failed for node", name + reason, input_name=name)
        for name in given or {"": None}
    ]
