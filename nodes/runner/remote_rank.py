"""One of the ranks of a video, on a machine where somebody else has started its process: what it is asked, and answers.

As with whole jobs (`remote.py`), what is asked is text and what comes back is bytes. Rank 0 alone answers with files, and
tells meanwhile of its progress.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...ltx2_core.host import Interrupted
from ...ltx2_core.paths import PathError
from .batch import reason_of
from .execute import NodeFailed, RunResult
from .options import OptionError
from .remote import Answer, names_below, pack, read_machine, read_request
from .session import Session, node_table
from .torchrun import Place, joined
from .workflow import WorkflowError

# interfaces of this machine alone, where all ranks are on it
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


@dataclass(frozen=True)
class RankFacts:
    """What a rank is told when it begins. machine: what ``machine_text`` returned. alone: all ranks are on one machine."""

    machine: str
    place: Place
    on_gpu: bool
    alone: bool

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> RankFacts:
        facts = json.loads(text)
        return cls(**{**facts, "place": Place(**facts["place"])})


class RemoteRank:
    """Runs one workflow together with the other ranks. ``stop``, ``told`` and ``end`` are called by another thread."""

    def __init__(self, facts: str):
        """facts: ``RankFacts`` as text. Raises PathError for an unusable ``extra_model_paths``."""
        told = RankFacts.of_text(facts)
        self._place = told.place
        if told.alone:
            os.environ.update(_LOOPBACK)
        if not told.on_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        folders, metadata = read_machine(told.machine)
        self._folder = tempfile.TemporaryDirectory(prefix="ltx2-", ignore_cleanup_errors=True)
        self._events: deque[dict[str, Any]] = deque()
        self._meeting: object = None
        shown: dict[str, Any] = {"progress": "quiet"}
        if self._place.rank == 0:
            shown = {"progress": "json", "on_event": self._note}
            log = logging.getLogger("ltx2")
            log.addHandler(_Noted(self._events))
            log.setLevel(logging.INFO)
        self._session = Session(folders, node_table(), metadata=metadata, **shown)

    def meet(self, address: str) -> str:
        """Where all ranks meet: ``address``, which is of this machine, and a port."""
        from ...ltx2_core.parallel.collectives import open_meeting

        self._meeting, port = open_meeting(address)
        return json.dumps([address, port])

    def run(self, request: str, meeting: str) -> bytes:
        """The answer to what ``request_text`` returned. Nothing of it stays on this machine, and nothing is raised."""
        folder = Path(self._folder.name)
        self._join(meeting)
        try:
            workflow, settings = read_request(request)
            with joined(self._place):
                result = self._session.run(workflow, folder, settings)
            return pack(self._done(result), folder)
        except Interrupted:
            return pack(Answer("interrupted"), folder)
        except Exception as error:
            return pack(Answer("failed", reason_of(error), details=_details(error)), folder)
        finally:
            self._folder.cleanup()

    def stop(self) -> None:
        """Ask the run to stop. Who waits for another rank in an exchange does not hear it."""
        self._session.host.interrupt()

    def told(self) -> str:
        """The events since the last call, as a JSON list."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return json.dumps(events, default=str)

    def end(self) -> None:
        """End this process, wherever it waits."""
        self._folder.cleanup()
        os._exit(0)

    def _join(self, meeting: str) -> None:
        address, port = json.loads(meeting)
        place = {"RANK": self._place.rank, "WORLD_SIZE": self._place.size, "MASTER_ADDR": address, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})

    def _done(self, result: RunResult) -> Answer:
        if self._place.rank:
            return Answer("done")
        details = {"outputs": result.outputs, "executed": result.executed}
        return Answer("done", files=names_below(Path(self._folder.name), result.files), details=details)

    def _note(self, type: str, **fields: Any) -> None:
        self._events.append({"type": type, **fields})


class _Noted(logging.Handler):
    """Lines of the log as events."""

    def __init__(self, events: deque[dict[str, Any]]):
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._events.append({"type": "log", "level": record.levelno, "text": self.format(record)})
        except Exception:
            self.handleError(record)


def _details(error: Exception) -> dict[str, Any]:
    """What is needed to raise the error again elsewhere; nothing for one that no workflow is to blame for."""
    if isinstance(error, NodeFailed):
        node = {"node_id": error.node_id, "class_type": error.class_type, "title": error.title}
        return {"node": {**node, "reason": error.reason, "cause_type": error.cause_type}}
    if isinstance(error, WorkflowError):
        return {"workflow": error.type}
    return {"option": True} if isinstance(error, OptionError | PathError) else {}
