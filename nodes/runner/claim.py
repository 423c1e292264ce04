"""A job that a worker holds: kept by renewing it, given up by one rename.

The folder of a held job carries its holder in its name, so whoever takes a job from a silent holder renames it, and every
later rename of the old holder fails: only one of them can publish the job's output.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LOG = logging.getLogger("ltx2.queue")

WORKFLOW, SETTINGS, HOLDERS, OUTPUT, ERROR = "workflow.json", "settings.json", "holders.txt", "output", "error.txt"
MAX_SETTINGS_BYTES = 2**20


class ClaimLost(RuntimeError):
    """Another worker has taken the job: this one was silent for too long. Its output must not be published."""


@dataclass(frozen=True)
class Claim:
    """The job ``name`` of the queue at ``root``, held by ``holder``, a name that no other claim has."""

    root: Path
    name: str
    holder: str

    @property
    def folder(self) -> Path:
        """Where the job lies as long as the claim is good."""
        return self.root / "running" / f"{self.name}@{self.holder}"

    @property
    def work(self) -> Path:
        """Where only this holder writes; what is there when the job is done becomes its output."""
        return self.root / "work" / f"{self.name}@{self.holder}"

    @property
    def workflow(self) -> Path:
        return self.folder / WORKFLOW

    def settings(self) -> list[str]:
        """The ``--set`` texts that the job was added with. Raises ValueError for a file that was not written by us."""
        try:
            with (self.folder / SETTINGS).open("rb") as file:
                texts = json.loads(file.read(MAX_SETTINGS_BYTES))
        except FileNotFoundError:
            return []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{SETTINGS} must hold a list of texts NODE.input=value")
        return texts

    def take(self) -> bool:
        """Whether this claim got the job, which lay in ``pending``."""
        source = self.root / "pending" / self.name
        with contextlib.suppress(FileNotFoundError):
            os.utime(source / WORKFLOW)  # a new claim is young, however long the job has waited
        try:
            os.rename(source, self.folder)
        except FileNotFoundError:
            # over a network a request may be repeated, and the second one finds the first one's work done
            if not self.folder.is_dir():
                return False
        return True

    def begin(self) -> list[str]:
        """Drop what an earlier holder left, and sign. Returns who held the job before and went silent. Raises ClaimLost."""
        with self._held():
            for entry in self.folder.iterdir():
                if entry.name not in (WORKFLOW, SETTINGS, HOLDERS):
                    _remove(entry)
            earlier = self._holders()
            self._sign([*earlier, self.holder])
            self.work.mkdir()
        return earlier

    def _holders(self) -> list[str]:
        path = self.folder / HOLDERS
        return path.read_text(encoding="utf-8").split() if path.is_file() else []

    def _sign(self, holders: list[str]) -> None:
        (self.folder / HOLDERS).write_text("".join(f"{one}\n" for one in holders), encoding="utf-8")

    def renew(self) -> None:
        """Say that the holder is alive. Raises ClaimLost."""
        with self._held():
            # without a time: the file system's clock counts, not this machine's
            os.utime(self.workflow)

    def commit(self) -> Path:
        """Publish what lies in ``work``; returns its place. Raises ClaimLost, and nothing is published."""
        with self._held():
            _flush(self.work)
            os.rename(self.work, self.folder / OUTPUT)
        return self._move("done") / OUTPUT

    def fail(self, reason: str) -> Path:
        """Put the job among the failed ones with the reason beside it; returns the reason's file. Raises ClaimLost."""
        with self._held():
            (self.folder / ERROR).write_text(reason.rstrip() + "\n", encoding="utf-8")
        return self._move("failed") / ERROR

    def put_back(self, *, blame: bool = False) -> None:
        """Let another worker have the job. Raises ClaimLost when one has it.

        blame: the holder stays in the job's list of those who went silent.
        """
        with self._held():
            if not blame:
                self._sign([one for one in self._holders() if one != self.holder])
            # whoever has it next may find it too early to renew it, and must not be taken for silent
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.workflow)
        self._move("pending")

    def _move(self, state: str) -> Path:
        target = self.root / state / self.name
        with self._held():
            os.rename(self.folder, target)
        return target

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """What fails inside because the job has gone is ClaimLost; either way nothing of an ended claim stays."""
        try:
            yield
        except FileNotFoundError as error:
            if self.folder.is_dir():
                raise
            shutil.rmtree(self.work, ignore_errors=True)
            raise ClaimLost(f"{self.name} was taken by another worker") from error
        if not self.folder.is_dir():
            shutil.rmtree(self.work, ignore_errors=True)


class Heartbeat:
    """Renews a claim by a thread, every so many seconds, from ``start`` to ``stop`` or inside a ``with`` block.

    ``lost``: another worker has the job."""

    def __init__(self, claim: Claim, every: float):
        self.lost = False
        self._claim, self._every, self._end = claim, every, threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat {claim.name}", daemon=True)

    def start(self) -> Heartbeat:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def __enter__(self) -> Heartbeat:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._end.wait(self._every):
            try:
                self._claim.renew()
            except ClaimLost:
                self.lost = True
                return
            except OSError as error:
                # a file system that is away for a moment: the next beat tries again, and the commit decides
                _LOG.warning("cannot renew the claim of %s: %s", self._claim.name, error)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _flush(folder: Path) -> None:
    """To the disk with it, before a rename says that it is there: a machine may die the moment after."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
