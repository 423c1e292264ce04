"""``ltx2``: runs API-format workflows without a ComfyUI server, says what model files are, and writes tiny ones.

Exit codes: 0 done, 1 a node failed, 2 the workflow, the options or an inspected file are invalid, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from .nodes.runner.batch import Outcome
    from .nodes.runner.job_queue import JobQueue
    from .nodes.runner.session import Folders, Session

OK, FAILED, INVALID, INTERRUPTED = 0, 1, 2, 130
OF_A_CLUSTER = "--nodes and --gpus say what to take of a Ray cluster: name it with --ray ADDRESS"


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
    _common_options(run)
    run.add_argument("--output", type=Path, default=Path("output"), metavar="DIR", help="folder that Save nodes write")
    run.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="machines of this Ray cluster make the video together; local: one on this machine",
    )
    run.add_argument("--nodes", type=int, metavar="N", help="with --ray: machines (default: all that have the GPUs)")
    run.add_argument("--gpus", type=int, metavar="N", help="with --ray: GPUs of each machine (default 1, or 0 without)")

    batch = commands.add_parser("batch", help="run many workflows, on one machine or several")
    batch.set_defaults(command=_batch)
    batch.add_argument(
        "flows",
        type=Path,
        nargs="*",
        metavar="FLOW",
        help="workflows in API format, or folders of them, to add to the queue",
    )
    batch.add_argument(
        "--queue", type=Path, default=Path("queue"), metavar="DIR", help="folder of the queue, made if there is none"
    )
    batch.add_argument("--join", type=Path, metavar="DIR", help="help with the queue in this folder, add nothing")
    batch.add_argument("--add-only", action="store_true", help="add the workflows and leave them to others")
    batch.add_argument("--wait", action="store_true", help="when no job is left, wait for more until stopped")
    batch.add_argument(
        "--expiry",
        type=float,
        metavar="SECONDS",
        help="of a new queue: after how long without a sign of life a job is taken from its worker (default 180)",
    )
    batch.add_argument("--ray", metavar="ADDRESS", help="run the jobs on this Ray cluster; local: one on this machine")
    batch.add_argument("--nodes", type=int, metavar="N", help="with --ray: workers (default: one a GPU, or a machine)")
    batch.add_argument(
        "--gpus", type=int, metavar="N", help="with --ray: GPUs of each worker (default 1, or 0 without)"
    )
    _common_options(batch)

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


def _common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.input=value",
        help="change a value; NODE is an id, class or title (repeatable)",
    )
    parser.add_argument(
        "--models",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder with checkpoints, loras, ... (repeatable; else $LTX2_MODELS)",
    )
    parser.add_argument("--input", type=Path, default=Path("input"), metavar="DIR", help="folder that Load nodes read")
    parser.add_argument("--extra-model-paths", type=Path, metavar="FILE", help="an extra_model_paths.yaml of ComfyUI")
    parser.add_argument("--disable-metadata", action="store_true", help="do not embed the workflow into saved files")
    parser.add_argument(
        "--json", action="store_true", help="one JSON event a line on stdout, the result as the last line"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, warnings and errors only")
    parser.add_argument("--verbose", action="store_true", help="debug messages, and the traceback of a failed node")


def _run(options: argparse.Namespace, nodes: Mapping[str, type] | None) -> int:
    from .nodes.runner.torchrun import Place

    place = Place.of_environment()
    if place is not None and place.rank:
        options.json, options.quiet = False, True
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
    from .nodes.runner.ray_cluster import ClusterError
    from .nodes.runner.ray_video import RankFailed
    from .nodes.runner.workflow import WorkflowError

    try:
        report.success(_run_workflow(options, nodes, report))
        return OK
    except WorkflowError as error:
        lines = error.lines()
        if any(line.endswith(" not in []") for line in lines):
            lines.append("hint: an empty list [] means that no file was found; name the folders: --models, --input")
        report.failure(error.type, "\n".join(lines), error.body)
        return INVALID
    except (OptionError, PathError, ClusterError) as error:
        report.failure("invalid_option", str(error))
        return INVALID
    except NodeFailed as error:
        if options.verbose:
            cause = error.__cause__ or error
            traceback.print_exception(type(cause), cause, cause.__traceback__)
        details = {"node_id": error.node_id, "node_type": error.class_type, "exception_type": error.cause_type}
        report.failure("execution_error", str(error), {**details, "exception_message": error.reason})
        return FAILED
    except RankFailed as error:
        report.failure("execution_error", str(error))
        return FAILED
    except (Interrupted, KeyboardInterrupt):
        report.failure("execution_interrupted", "interrupted; nothing unfinished was kept")
        return INTERRUPTED


def _run_workflow(options: argparse.Namespace, nodes: Mapping[str, type] | None, report: _Report) -> Any:
    from .nodes.runner.workflow import read_workflow

    if _takes_of_a_cluster(options):
        return _run_with_ray(options, nodes, report)
    workflow = read_workflow(options.flow)
    with _ranks(options) as output:
        session = _session(options, nodes, "json" if options.json else "bar", on_event=report.event)
        with session.host.signals():
            return session.run(workflow, output, options.set)


def _takes_of_a_cluster(options: argparse.Namespace) -> bool:
    """Whether machines of a Ray cluster make the video. Raises OptionError for options that say it in part."""
    from .nodes.runner.options import OptionError
    from .nodes.runner.torchrun import Place

    if options.ray is None and (options.nodes is not None or options.gpus is not None):
        raise OptionError(OF_A_CLUSTER)
    if options.ray is not None and Place.of_environment() is not None:
        raise OptionError("torchrun has started this process, and --ray starts processes too: choose one of them")
    return options.ray is not None


def _run_with_ray(options: argparse.Namespace, nodes: Mapping[str, type] | None, report: _Report) -> Any:
    from .nodes.runner import ray_video
    from .nodes.runner.ray_cluster import Cluster
    from .nodes.runner.remote import request_text
    from .nodes.runner.session import RunnerHost, make_output
    from .nodes.runner.workflow import decode_workflow, read_bytes

    cluster, folders = Cluster(options.ray, options.nodes, options.gpus), _folders(options)
    text = read_bytes(options.flow)
    workflow = decode_workflow(text, options.flow)
    ray_video.check_here(_session(options, nodes, "quiet"), folders, workflow, options.set)
    make_output(options.output)
    host = RunnerHost(output_dir=options.output, progress="quiet" if options.json or options.quiet else "bar")
    # Ray has a handler of signals of its own, so ours come behind it
    with ray_video.ranks(cluster, folders, metadata=not options.disable_metadata) as ranks, host.signals():
        return ranks.make(request_text(options.flow.name, text, options.set), host, report.event)


@contextlib.contextmanager
def _ranks(options: argparse.Namespace) -> Iterator[Path]:
    """Under torchrun all processes make one video, and rank 0 alone shows and keeps it. Yields the folder to save into."""
    from .nodes.runner.torchrun import Place, joined

    place = Place.of_environment()
    if place is None:
        yield options.output
        return
    place.take_gpu()
    with joined(place), tempfile.TemporaryDirectory(prefix="ltx2-") as unseen:
        yield options.output if place.rank == 0 else Path(unseen)


def _session(options: argparse.Namespace, nodes: Mapping[str, type] | None, progress: str, **more: Any) -> Session:
    from .nodes.runner.session import Session, node_table

    shown = "quiet" if options.quiet else progress
    return Session(_folders(options), node_table(nodes), progress=shown, metadata=not options.disable_metadata, **more)


def _folders(options: argparse.Namespace) -> Folders:
    from .nodes.runner.session import Folders

    return Folders(tuple(options.models), options.input, options.extra_model_paths)


def _batch(options: argparse.Namespace, nodes: Mapping[str, type] | None) -> int:
    from .ltx2_core.host import Interrupted
    from .ltx2_core.paths import PathError
    from .nodes.runner.job_queue import QueueError
    from .nodes.runner.ray_cluster import ClusterError
    from .nodes.runner.workflow import WorkflowError

    stray = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    report = _BatchReport(sys.stdout, options)
    with stray, _logging(options):
        try:
            queue = _open_queue(options)
            failed_before = set(queue.names("failed"))
            if not options.add_only:
                _serve(queue, options, nodes, report)
            return report.finish(queue, failed_before)
        except WorkflowError as error:
            print("ltx2:", *error.lines(), file=sys.stderr)
        except (QueueError, PathError, ClusterError) as error:
            print(f"ltx2: {error}", file=sys.stderr)
        except OSError as error:
            print(f"ltx2: the queue cannot be reached: {error}; what ran here expires", file=sys.stderr)
            return FAILED
        except (Interrupted, KeyboardInterrupt):
            print("ltx2: interrupted; what ran here waits in the queue again", file=sys.stderr)
            return INTERRUPTED
    return INVALID


def _open_queue(options: argparse.Namespace) -> JobQueue:
    """The queue of the options, with the workflows of the command line added, if all of them can be read."""
    from .nodes.runner.job_queue import EXPIRY, JobQueue, QueueError
    from .nodes.runner.workflow import decode_workflow, find_workflows, read_bytes

    if options.ray is None and (options.nodes is not None or options.gpus is not None):
        raise QueueError(OF_A_CLUSTER)
    if options.join is not None:
        if options.flows or options.set or options.expiry is not None or options.add_only:
            raise QueueError("--join only runs what is in a queue; to add to it, name the queue: FLOW ... --queue DIR")
        return JobQueue.open(options.join)
    if not options.flows:
        raise QueueError("nothing to do: name workflows or folders of them, or a queue to help with: --join DIR")
    found = [(path, read_bytes(path)) for path in find_workflows(options.flows)]
    for path, text in found:
        decode_workflow(text, path)
    queue = JobQueue.create(options.queue, EXPIRY if options.expiry is None else options.expiry)
    if options.expiry not in (None, queue.expiry):
        raise QueueError(f"{queue.root} was made with --expiry {queue.expiry:g}, which holds for all who serve it")
    for path, text in found:
        queue.add(text, path.stem, options.set)
    return queue


def _serve(
    queue: JobQueue, options: argparse.Namespace, nodes: Mapping[str, type] | None, report: _BatchReport
) -> None:
    from .nodes.runner.batch import serve
    from .nodes.runner.torchrun import Place

    place = Place.of_environment()
    if place is not None:
        # each process of torchrun takes whole jobs, on a GPU of its own
        place.take_gpu()
    if options.ray is not None:
        _serve_with_ray(queue, options, report)
        return
    session = _session(options, nodes, "quiet" if options.json else "bar", keep_models=True)
    with session.host.signals():
        serve(queue, session, report.job, wait=options.wait)


def _serve_with_ray(queue: JobQueue, options: argparse.Namespace, report: _BatchReport) -> None:
    from .nodes.runner import ray_nodes
    from .nodes.runner.ray_cluster import Cluster
    from .nodes.runner.session import RunnerHost

    cluster = Cluster(options.ray, options.nodes, options.gpus)
    host = RunnerHost(progress="quiet")
    # Ray has a handler of signals of its own, so ours come behind it
    with (
        ray_nodes.workers(cluster, _folders(options), metadata=not options.disable_metadata) as workers,
        host.signals(),
    ):
        ray_nodes.serve(queue, workers, host, report.job, wait=options.wait)


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


class _BatchReport:
    """A line for each job that begins or ends here, as text or JSON, and how many of the queue's jobs failed."""

    def __init__(self, stream: TextIO, options: argparse.Namespace):
        self._stream, self._json, self._quiet = stream, options.json, options.quiet

    def job(self, outcome: Outcome) -> None:
        files = [str(path) for path in outcome.files]
        if self._json:
            facts = {"job": outcome.job, "state": outcome.state, "elapsed_seconds": round(outcome.seconds, 3)}
            self._line({"schema": "event/1", "type": "job", **facts, "files": files, "reason": outcome.reason})
            return
        told = f"{outcome.job}: {outcome.state}" + (f" in {outcome.seconds:.1f} s" if outcome.seconds else "")
        if outcome.state == "failed":
            print("ltx2:", told, outcome.reason, sep=" ", file=sys.stderr)
        elif not self._quiet:
            print(told, *files, sep="\n  ", file=self._stream, flush=True)

    def finish(self, queue: JobQueue, failed_before: set[str]) -> int:
        """The exit code, after a last line: 1 if a job has failed, here or elsewhere, since this process began."""
        from .nodes.runner.job_queue import STATES

        counts = {state: len(queue.names(state)) for state in STATES}
        if self._json:
            self._line({"schema": "event/1", "type": "queue", "queue": str(queue.root), **counts})
        elif not self._quiet:
            told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
            print(f"{queue.root}: {told or 'empty'}", file=self._stream, flush=True)
        return FAILED if set(queue.names("failed")) - failed_before else OK

    def _line(self, payload: dict[str, Any]) -> None:
        print(json.dumps(payload), file=self._stream, flush=True)


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
