"""``ltx2``: runs API-format workflows without a ComfyUI server, says what model files are, and writes tiny ones.

Exit codes: 0 done, 1 a node failed, 2 the workflow, the options or an inspected file are invalid, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

OK, FAILED, INVALID, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None, nodes: Mapping[str, type] | None = None) -> int:
    """Run one command and return its exit code. ``nodes`` replaces the pack's node table, for tests."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:
        return INVALID if stop.code else OK
    return options.command(options, nodes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ltx2", description="LTX-2 Engine without a ComfyUI server.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a workflow in API format")
    run.set_defaults(command=_run)
    run.add_argument("flow", type=Path, metavar="FLOW.json")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.input=value",
        help="change a value; NODE is an id, class or title (repeatable)",
    )
    run.add_argument(
        "--models",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder with checkpoints, loras, ... (repeatable; else $LTX2_MODELS)",
    )
    run.add_argument("--input", type=Path, default=Path("input"), metavar="DIR", help="folder that Load nodes read")
    run.add_argument("--output", type=Path, default=Path("output"), metavar="DIR", help="folder that Save nodes write")
    run.add_argument("--extra-model-paths", type=Path, metavar="FILE", help="an extra_model_paths.yaml of ComfyUI")
    run.add_argument("--disable-metadata", action="store_true", help="do not embed the workflow into saved files")
    run.add_argument("--json", action="store_true", help="one JSON event a line on stdout, the result as the last line")
    run.add_argument("--quiet", action="store_true", help="no progress, warnings and errors only")
    run.add_argument("--verbose", action="store_true", help="debug messages, and the traceback of a failed node")

    tiny = commands.add_parser("tiny", help="write a tiny random model set, to try workflows on any machine")
    tiny.set_defaults(command=_tiny)
    tiny.add_argument("--models", type=Path, required=True, metavar="DIR", help="models folder to write into")
    tiny.add_argument("--version", default="2.3", help="model version to imitate (default 2.3)")
    tiny.add_argument(
        "--layout",
        choices=("full", "split"),
        help="one checkpoint, or one file a component (default: as the version was released)",
    )

    inspect = commands.add_parser("inspect", help="say what model files are and what goes with them")
    inspect.set_defaults(command=_inspect)
    inspect.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="a weight file, or the folder of a text encoder"
    )
    inspect.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _run(options: argparse.Namespace, nodes: Mapping[str, type] | None) -> int:
    report = _Report(sys.stdout, options)
    # in JSON mode stdout carries events only, whatever a node or a library prints
    stray = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    with stray, _logging(options):
        return _reported_run(options, nodes, report)


def _reported_run(options: argparse.Namespace, nodes: Mapping[str, type] | None, report: _Report) -> int:
    from .ltx2_core.host import Interrupted
    from .ltx2_core.paths import PathError
    from .nodes.runner.execute import NodeFailed
    from .nodes.runner.options import OptionError
    from .nodes.runner.workflow import WorkflowError

    try:
        report.success(_run_workflow(options, _node_table(nodes), report))
        return OK
    except WorkflowError as error:
        lines = error.lines()
        if any(line.endswith(" not in []") for line in lines):
            lines.append("hint: an empty list [] means that no file was found; name the folders: --models, --input")
        report.failure(error.type, "\n".join(lines), error.body)
        return INVALID
    except (OptionError, PathError) as error:
        report.failure("invalid_option", str(error))
        return INVALID
    except NodeFailed as error:
        cause = error.__cause__ or error
        if options.verbose:
            traceback.print_exception(type(cause), cause, cause.__traceback__)
        details = {"node_id": error.node_id, "node_type": error.class_type, "exception_type": type(cause).__name__}
        report.failure("execution_error", str(error), {**details, "exception_message": error.reason})
        return FAILED
    except (Interrupted, KeyboardInterrupt):
        report.failure("execution_interrupted", "interrupted; nothing unfinished was kept")
        return INTERRUPTED


def _run_workflow(options: argparse.Namespace, nodes: Mapping[str, type], report: _Report) -> Any:
    from .ltx2_core.host import use_host
    from .ltx2_core.standalone import StandaloneHost
    from .nodes.runner.execute import execute
    from .nodes.runner.options import apply_settings
    from .nodes.runner.validate import validate
    from .nodes.runner.workflow import read_workflow

    workflow = read_workflow(options.flow)
    environment = [Path(root) for root in os.environ.get("LTX2_MODELS", "").split(os.pathsep) if root]
    host = StandaloneHost(
        model_roots=options.models or environment,
        input_dir=options.input,
        output_dir=options.output,
        progress="json" if options.json else "quiet" if options.quiet else "bar",
        extra_model_paths=options.extra_model_paths,
        on_event=report.event,
    )
    # input lists come from the host, so it is in place before the nodes are asked what they take
    with use_host(host), host.signals():
        chosen = apply_settings(workflow.prompt, nodes, options.set)
        prompt = validate(chosen, nodes)
        if not options.disable_metadata:
            host.metadata = {**(workflow.extra_data.get("extra_pnginfo") or {}), "prompt": chosen}
        report.event("queued", node_count=len(prompt))
        return execute(prompt, nodes, host, workflow.extra_data, report.event)


def _node_table(nodes: Mapping[str, type] | None) -> Mapping[str, type]:
    from .nodes.runner.core_nodes import CORE_NODES

    if nodes is not None:
        return {**CORE_NODES, **nodes}
    from .nodes import NODE_CLASS_MAPPINGS

    return {**CORE_NODES, **NODE_CLASS_MAPPINGS}


def _tiny(options: argparse.Namespace, nodes: Mapping[str, type] | None) -> int:
    from .ltx2_core.tiny import write_tiny_set

    try:
        for path in write_tiny_set(options.models, options.version, options.layout):
            print(path)
    except (ValueError, OSError) as error:
        print(f"ltx2: {error}", file=sys.stderr)
        return INVALID
    return OK


def _inspect(options: argparse.Namespace, nodes: Mapping[str, type] | None) -> int:
    from .ltx2_core.inspect_files import inspect_files

    found = inspect_files(options.files)
    if options.json:
        print(json.dumps({"schema": "inspect/1", "files": [facts.to_json() for facts in found]}, indent=1))
    else:
        for facts in found:
            print(facts, file=sys.stdout if facts.error is None else sys.stderr)
    return INVALID if any(facts.error for facts in found) else OK


class _Report:
    """What the user sees: JSON lines in the form of comfy-cli's events and envelope, or plain text."""

    def __init__(self, stream: TextIO, options: argparse.Namespace):
        self._stream, self._json, self._quiet = stream, options.json, options.quiet
        self._flow, self._prompt_id, self._start = str(options.flow), str(uuid.uuid4()), time.monotonic()

    def event(self, type: str, **fields: Any) -> None:
        if self._json:
            self._line({"schema": "event/1", "type": type, **fields, "prompt_id": self._prompt_id})

    def success(self, result: Any) -> None:
        files = [str(path) for path in result.files]
        if self._json:
            self._envelope(
                {
                    "status": "completed",
                    "outputs": files,
                    "outputs_by_node": result.outputs,
                    "executed_node_ids": result.executed,
                }
            )
        elif not self._quiet:
            print(*files, f"done in {self._elapsed():.1f} s", sep="\n", file=self._stream)

    def failure(self, code: str, message: str, details: Any = None) -> None:
        if self._json:
            self._envelope({"status": "error"}, {"code": code, "message": message, "details": details})
        else:
            print(f"ltx2: {message}", file=sys.stderr)

    def _envelope(self, data: dict[str, Any], error: dict[str, Any] | None = None) -> None:
        common = {"workflow": self._flow, "prompt_id": self._prompt_id, "elapsed_seconds": round(self._elapsed(), 3)}
        envelope = {"schema": "envelope/1", "ok": error is None, "command": "run", "where": "local"}
        self._line({**envelope, "data": {**common, **data}, "error": error})

    def _elapsed(self) -> float:
        return time.monotonic() - self._start

    def _line(self, payload: dict[str, Any]) -> None:
        print(json.dumps(payload, default=str), file=self._stream, flush=True)


class _LogHandler(logging.Handler):
    """Lines on stderr, above progress bars instead of inside them: threads write at any time."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def _logging(options: argparse.Namespace) -> Iterator[None]:
    """The pack's log on stderr while a command runs."""
    logger, handler = logging.getLogger("ltx2"), _LogHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if options.verbose else logging.WARNING if options.quiet else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _make_package() -> None:
    """The canonical package over this file's folder, for a run by path; the folder itself leaves the import path."""
    import types

    root = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [str(root)]
    sys.modules["ltx2_engine"] = package


if __name__ == "__main__":
    if not __package__:
        _make_package()
        from ltx2_engine.cli import main
    sys.exit(main())
