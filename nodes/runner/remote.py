"""A job on another machine: what is asked is text, what comes back is bytes, and both are checked on arrival.

An answer is one safetensors file: ``facts``, a JSON object, and every saved file under ``file/`` and its relative name.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ltx2_core.host import Interrupted
from ...ltx2_core.paths import check_relative
from .batch import FAILURES, reason_of
from .schema import NodeTable
from .session import Folders, Session, node_table
from .workflow import decode_workflow

_FACTS, _FILE = "facts", "file/"
STATES = ("done", "failed", "interrupted")


@dataclass(frozen=True)
class Answer:
    """How a job ended elsewhere. files: relative names of what it saved."""

    state: str
    reason: str = ""
    files: tuple[str, ...] = ()


class RemoteNode:
    """Runs the jobs that it is sent, one at a time, with the last one's models still loaded."""

    def __init__(self, machine: str, nodes: NodeTable | None = None):
        """machine: what ``machine_text`` returned. Raises PathError for an unusable ``extra_model_paths``."""
        folders, metadata = _machine(machine)
        self._session = Session(folders, node_table(nodes), progress="quiet", metadata=metadata, keep_models=True)

    def run(self, request: str) -> bytes:
        """The answer to a request that ``request_text`` returned. Nothing of a job stays on this machine, and nothing is raised."""
        with tempfile.TemporaryDirectory(prefix="ltx2-") as folder:
            try:
                asked = json.loads(request)
                workflow = decode_workflow(asked["workflow"].encode(), Path(asked["name"]))
                result = self._session.run(workflow, Path(folder), asked["settings"])
            except FAILURES as error:
                return pack(Answer("failed", reason_of(error)), Path(folder))
            except Interrupted:
                return pack(Answer("interrupted"), Path(folder))
            saved = (path.relative_to(folder) for path in result.files if path.is_relative_to(folder))
            return pack(Answer("done", files=tuple(path.as_posix() for path in saved)), Path(folder))

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


def _machine(text: str) -> tuple[Folders, bool]:
    facts = json.loads(text)
    extra = facts["extra_model_paths"]
    folders = Folders(tuple(map(Path, facts["models"])), Path(facts["input"]), extra and Path(extra))
    return folders, bool(facts["metadata"])


def request_text(name: str, workflow: bytes, settings: Sequence[str]) -> str:
    """What a worker is asked to run. Raises UnicodeDecodeError, a ValueError, for what is no text."""
    return json.dumps({"name": name, "workflow": workflow.decode("utf-8-sig"), "settings": list(settings)})


def pack(answer: Answer, folder: Path) -> bytes:
    """The answer and its files below ``folder`` as bytes."""
    import numpy as np
    from safetensors.numpy import save

    facts = json.dumps({"state": answer.state, "reason": answer.reason}).encode()
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
    state, reason = facts.get("state"), facts.get("reason")
    bytes_only = all(part.dtype == np.uint8 and name.startswith(_FILE) for name, part in parts.items())
    if state not in STATES or not isinstance(reason, str) or not bytes_only:
        raise ValueError(f"a worker answered in another form: state {state!r}, parts {sorted(parts)[:5]}")
    names = [check_relative(name.removeprefix(_FILE), "a worker's file name") for name in sorted(parts)]
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(parts[_FILE + name].tobytes())
    return Answer(state, reason, tuple(names))
