"""A job on another machine: what is asked is text, what comes back is bytes, and both are checked on arrival.

An answer is one safetensors file: ``facts``, a JSON object, and every saved file under ``file/`` and its relative name.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...ltx2_core.host import Interrupted
from ...ltx2_core.paths import check_relative
from .batch import FAILURES, reason_of
from .schema import NodeTable
from .session import Folders, Session, node_table
from .workflow import Workflow, decode_workflow

_FACTS, _FILE = "facts", "file/"
STATES = ("done", "failed", "interrupted")


@dataclass(frozen=True)
class Answer:
    """How a job ended elsewhere. files: relative names of what it saved. details: what else there is to tell, in JSON."""

    state: str
    reason: str = ""
    files: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


class RemoteNode:
    """Runs the jobs that it is sent, one at a time, with the last one's models still loaded."""

    def __init__(self, machine: str, nodes: NodeTable | None = None):
        """machine: what ``machine_text`` returned. Raises PathError for an unusable ``extra_model_paths``."""
        folders, metadata = read_machine(machine)
        self._session = Session(folders, node_table(nodes), progress="quiet", metadata=metadata, keep_models=True)

    def run(self, request: str) -> bytes:
        """The answer to a request that ``request_text`` returned. Nothing of a job stays on this machine, and nothing is raised."""
        with tempfile.TemporaryDirectory(prefix="ltx2-") as folder:
            try:
                workflow, settings = read_request(request)
                result = self._session.run(workflow, Path(folder), settings)
            except FAILURES as error:
                return pack(Answer("failed", reason_of(error)), Path(folder))
            except Interrupted:
                return pack(Answer("interrupted"), Path(folder))
            return pack(Answer("done", files=names_below(Path(folder), result.files)), Path(folder))

    def stop(self) -> None:
        """Ask the job that runs to stop. Called by another thread."""
        self._session.host.interrupt()


def machine_text(folders: Folders, *, metadata: bool) -> str:
    """Where models and inputs lie on all machines, as a worker is told when it begins."""
    return json.dumps(
        {
            "models": [str(path.absolute()) for path in folders.model_roots],
            "input": str(folders.input.absolute()),
            "extra_model_paths": folders.extra_model_paths and str(folders.extra_model_paths.absolute()),
            "metadata": metadata,
        }
    )


def read_machine(text: str) -> tuple[Folders, bool]:
    """The folders, and whether to embed workflows, that ``machine_text`` was given."""
    facts = json.loads(text)
    extra = facts["extra_model_paths"]
    folders = Folders(tuple(map(Path, facts["models"])), Path(facts["input"]), extra and Path(extra))
    return folders, bool(facts["metadata"])


def request_text(name: str, workflow: bytes, settings: Sequence[str]) -> str:
    """What a worker is asked to run. Raises UnicodeDecodeError, a ValueError, for what is no text."""
    return json.dumps({"name": name, "workflow": workflow.decode("utf-8-sig"), "settings": list(settings)})


def read_request(text: str) -> tuple[Workflow, list[str]]:
    """The workflow and the settings that ``request_text`` was given. Raises WorkflowError."""
    asked = json.loads(text)
    return decode_workflow(asked["workflow"].encode(), Path(asked["name"])), asked["settings"]


def names_below(folder: Path, files: Sequence[Path]) -> tuple[str, ...]:
    """The relative names of those files that lie below the folder."""
    return tuple(path.relative_to(folder).as_posix() for path in files if path.is_relative_to(folder))


def pack(answer: Answer, folder: Path) -> bytes:
    """The answer and its files below ``folder`` as bytes."""
    import numpy as np
    from safetensors.numpy import save

    told = {"state": answer.state, "reason": answer.reason, "details": answer.details}
    facts = json.dumps(told, default=str).encode()
    files = {_FILE + name: (folder / name).read_bytes() for name in answer.files}
    return save({name: np.frombuffer(data, np.uint8) for name, data in {_FACTS: facts, **files}.items()})


def unpack(data: bytes, folder: Path) -> Answer:
    """The answer that bytes hold; its files are written below ``folder``.

    Raises ValueError for bytes of another form, and PathError, which is one, for a name that leads out of the folder.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        parts = load(data)
        facts: dict[str, Any] = json.loads(parts.pop(_FACTS).tobytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"a worker answered with bytes of another form: {error}") from error
    state, reason, details = facts.get("state"), facts.get("reason"), facts.get("details", {})
    bytes_only = all(part.dtype == np.uint8 and name.startswith(_FILE) for name, part in parts.items())
    if state not in STATES or not isinstance(reason, str) or not isinstance(details, dict) or not bytes_only:
        raise ValueError(f"a worker answered in another form: state {state!r}, parts {sorted(parts)[:5]}")
    names = [check_relative(name.removeprefix(_FILE), "a worker's file name") for name in sorted(parts)]
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(parts[_FILE + name].tobytes())
    return Answer(state, reason, tuple(names), details)
