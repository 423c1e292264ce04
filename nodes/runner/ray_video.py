"""One video that machines of a Ray cluster (`ray_cluster.py`) make together.

The actors are ranks as processes of torchrun are: each runs the whole workflow, and they share its sampling. Rank 0's files
come here. No rank outlives a run: one that waits in an exchange with a rank that is gone can only be ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ltx2_core.host import Progress, SavedFile
from .batch import POLL
from .execute import FILE_LISTS, Event, NodeFailed, RunResult
from .options import OptionError
from .ray_cluster import ActorLost, Actors, Bundles, Cluster, ClusterError, connected
from .remote import Answer, machine_text, unpack
from .remote_rank import RankFacts
from .session import Folders, RunnerHost, Session
from .torchrun import Place
from .workflow import Workflow, WorkflowError

_LOG = logging.getLogger("ltx2.ray")

# how long ranks may compute before one hears a stop, and how long the others may then; after a failure longer, for it may
# be heard of before its cause
_STOP_SECONDS = 10.0
_OTHERS_SECONDS = 1.0
_CAUSE_SECONDS = 3.0
_SAVED = re.compile(r"(.+)_[0-9]{5,12}_\.([A-Za-z0-9]{1,8})")


class RankFailed(RuntimeError):
    """A rank has died, or failed outside the nodes, or what rank 0 saved cannot be kept here."""


def check_here(session: Session, folders: Folders, workflow: Workflow, settings: Sequence[str]) -> None:
    """Refuse what no machine can run, before one is asked. Raises WorkflowError, OptionError.

    Where folders of models are missing here, the machines have the last word: the names in a workflow are theirs.
    """
    roots = folders.model_roots
    try:
        session.check(workflow, settings)
    except WorkflowError:
        if roots and all(root.is_dir() for root in roots):
            raise


@contextlib.contextmanager
def ranks(cluster: Cluster, folders: Folders, *, metadata: bool) -> Iterator[Ranks]:
    """Ranks of a cluster, all of which are ready. Raises ClusterError."""
    with connected(cluster, (cluster.count or 1) * max(cluster.gpus or 1, 1)) as connection:
        bundles = _bundles(cluster, connection.gpus_of_machines())
        size = bundles.count * bundles.actors
        _LOG.info("%d ranks make the video, %d on each of %d machines", size, bundles.actors, bundles.count)
        machine = machine_text(folders, metadata=metadata)
        facts = [
            RankFacts(
                machine, Place(rank, size, rank % bundles.actors, bundles.actors), bundles.gpus > 0, cluster.is_local
            )
            for rank in range(size)
        ]
        yield Ranks(connection.actors(bundles, "rank", [one.to_text() for one in facts]), cluster.is_local)


def _bundles(cluster: Cluster, gpus_of_machines: list[int]) -> Bundles:
    """One for each machine; a local cluster is one machine that stands for several."""
    gpus = min(max(gpus_of_machines), 1) if cluster.gpus is None else cluster.gpus
    able = sum(1 for there in gpus_of_machines if there >= gpus)
    count = cluster.count or max(able, 1)
    if gpus * count > sum(gpus_of_machines) or not (cluster.is_local or count <= able):
        raise ClusterError(
            f"{count} machines with {gpus} GPUs each were asked for (--nodes, --gpus); the machines of the cluster have "
            f"{', '.join(map(str, gpus_of_machines))} GPUs"
        )
    return Bundles(count, gpus, actors=max(gpus, 1), apart=not cluster.is_local)


class Ranks:
    """Actors that make one video, and end with it."""

    def __init__(self, actors: Actors, local: bool):
        self._actors, self._local = actors, local

    def make(self, request: str, host: RunnerHost, event: Event) -> RunResult:
        """Run what ``request_text`` returned, and save into the host's output folder what rank 0 has saved.

        Raises what a run here would, and RankFailed.
        """
        with tempfile.TemporaryDirectory(prefix="ltx2-") as folder:
            run = _Run(self._actors, request, self._meeting(), Path(folder))
            shown = _Shown(self._actors, host, event)
            try:
                while run.goes_on:
                    run.wait(POLL)
                    shown.show()
                    host.check_interrupt()
                shown.show(last=True)
            finally:
                shown.close()
                run.end()
            host.check_interrupt()
            if run.failed:
                raise _cause(run.failed)
            return _keep(run.answers[0], Path(folder), host, event)

    def _meeting(self) -> str:
        asked = self._actors.ask(0, "meet", "127.0.0.1" if self._local else "")
        try:
            return self._actors.answer(asked)
        except ActorLost as error:
            raise RankFailed(f"rank 0: {error}") from error


class _Run:
    """A workflow on all ranks, until all have answered, or one of them with something else than success."""

    def __init__(self, actors: Actors, request: str, meeting: str, folder: Path):
        """folder: where the files of rank 0 go."""
        self._actors, self._folder = actors, folder
        self._running = {actors.ask(rank, "run", request, meeting): rank for rank in range(len(actors))}
        self.answers: dict[int, Answer] = {}

    @property
    def failed(self) -> dict[int, Answer]:
        return {rank: answer for rank, answer in self.answers.items() if answer.state != "done"}

    @property
    def goes_on(self) -> bool:
        return bool(self._running) and not self.failed

    def wait(self, seconds: float) -> None:
        """Take the answers that have come when the first one comes, or the time is over."""
        for ended in self._actors.ended(list(self._running), seconds):
            rank = self._running.pop(ended)
            self.answers[rank] = self._answer(ended)

    def end(self) -> None:
        """Have all ranks stop, and end those that cannot hear it because they wait for one that has."""
        limit = time.monotonic() + _STOP_SECONDS
        patience = _CAUSE_SECONDS if self.failed else _OTHERS_SECONDS
        for rank in self._running.values():
            self._actors.ask(rank, "stop")
        while self._running and time.monotonic() < limit:
            self.wait(0.1)
            if self.failed:
                limit = min(limit, time.monotonic() + patience)
        for rank in self._running.values():
            self._actors.ask(rank, "end")
        self._actors.ended(list(self._running), _OTHERS_SECONDS, count=len(self._running))

    def _answer(self, ended: Any) -> Answer:
        try:
            return unpack(self._actors.answer(ended), self._folder)
        except ActorLost as error:
            return Answer("failed", f"its process has ended: {error}", details={"lost": True})
        except (ValueError, OSError) as error:
            return Answer("failed", str(error))


def _cause(failed: dict[int, Answer]) -> Exception:
    """What to tell of ranks that did not succeed: those whose process is gone come first, for they make others fail."""
    rank, answer = min(failed.items(), key=lambda item: (_order(item[1]), item[0]))
    reason, details = answer.reason or "it was stopped where it runs", answer.details
    if "workflow" in details:
        return WorkflowError(str(details["workflow"]), reason)
    if "node" in details:
        node = details["node"]
        return NodeFailed(**{**node, "reason": f"rank {rank}: {node['reason']}"})
    return OptionError(reason) if "option" in details else RankFailed(f"rank {rank}: {reason}")


def _order(answer: Answer) -> int:
    return 0 if "lost" in answer.details else 1 if answer.state == "failed" else 2


def _keep(answer: Answer, folder: Path, host: RunnerHost, event: Event) -> RunResult:
    """The files of rank 0, which lie in ``folder``, under the next free names of the output folder; its result says those."""
    outputs: dict[str, dict[str, Any]] = answer.details["outputs"]
    files = []
    for node, ui in outputs.items():
        for entry in (entry for key in FILE_LISTS for entry in ui.get(key, ()) if isinstance(entry, dict)):
            name = "/".join(filter(None, (entry.get("subfolder"), entry.get("filename"))))
            if name in answer.files and entry.get("type", "output") == "output":
                saved = _keep_file(folder / name, name, host)
                entry.update(saved.ui())
                files.append(saved.path)
                event("output", node=node, path=str(saved.path), folder=saved.type)
    return RunResult(outputs, answer.details["executed"], files)


def _keep_file(source: Path, name: str, host: RunnerHost) -> SavedFile:
    named = _SAVED.fullmatch(name)
    if named is None:
        raise RankFailed(f"rank 0 saved {name!r}, which is no name of a Save node")
    try:
        saved = host.save_path(named[1], named[2])
        with saved.path.open("xb") as file:
            file.write(source.read_bytes())
    except OSError as error:
        raise RankFailed(f"{name} cannot be saved: {error}") from error
    return saved


@dataclass
class _Stretch:
    """A bar, and what it shows: ``total`` steps of a node."""

    node: str | None
    total: int
    bar: Progress
    completed: int = 0


class _Shown:
    """What rank 0 tells of its run, shown here: events, progress as bars, and lines of its log."""

    def __init__(self, actors: Actors, host: RunnerHost, event: Event):
        self._actors, self._host, self._event = actors, host, event
        self._asked: Any = actors.ask(0, "told")
        self._classes: dict[str, str] = {}
        self._stretch: _Stretch | None = None

    def show(self, *, last: bool = False) -> None:
        """Show what has come since the last call; ``last``: all that there is."""
        for seconds in (1.0, 1.0) if last else (0.0,):
            if self._asked is None or not self._actors.ended([self._asked], seconds):
                return
            try:
                events = json.loads(self._actors.answer(self._asked))
                self._asked = self._actors.ask(0, "told")
            except ActorLost:
                # its answer to the run tells why
                self._asked, events = None, []
            for fields in events:
                self._show_one(**fields)

    def close(self) -> None:
        if self._stretch is not None:
            self._stretch.bar.__exit__(None, None, None)
            self._stretch = None

    def _show_one(self, type: str, **fields: Any) -> None:
        if type == "log":
            _LOG.log(fields["level"], "%s", fields["text"])
            return
        if type == "executing":
            self._classes[fields["node"]] = fields["class_type"]
        if type == "progress":
            self._move_bar(fields["node"], fields["completed"], fields["total"])
        # where files lie is known when they are here
        if type != "output":
            self._event(type, **fields)

    def _move_bar(self, node: str | None, completed: int, total: int) -> None:
        now = self._stretch
        if now is None or (now.node, now.total) != (node, total) or completed < now.completed:
            self.close()
            bar = self._host.progress(total, self._classes.get(node or "", "working"))
            now = self._stretch = _Stretch(node, total, bar.__enter__())
        now.completed = completed
        now.bar.to(completed)
