"""A queue of workflows: folders on a file system that several machines may share.

    queue.json                     how long a claim lasts without a sign of life
    numbers/00001                  a number that is taken
    pending/00001_NAME/            workflow.json and settings.json, waiting
    running/00001_NAME@HOLDER/     the same, held by HOLDER; the age of workflow.json is its last sign of life
    work/00001_NAME@HOLDER/        what HOLDER has written so far
    done/00001_NAME/               workflow.json and output/
    failed/00001_NAME/             workflow.json and error.txt

A job changes its state by one rename of its folder (`claim.py`), so it is in one state at any moment, whoever dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .claim import MAX_SETTINGS_BYTES, SETTINGS, WORKFLOW, Claim, ClaimLost

STATES = ("pending", "running", "done", "failed")
EXPIRY = 180.0
MIN_EXPIRY, MAX_EXPIRY = 1.0, 86_400.0
MAX_JOBS = 100_000

_NUMBER = re.compile(r"[0-9]{5,6}", re.ASCII)
_NAME = re.compile(r"[0-9]{5,6}_[A-Za-z0-9_.-]{1,80}", re.ASCII)
_HELD = re.compile(r"([0-9]{5,6}_[A-Za-z0-9_.-]{1,80})@([A-Za-z0-9_.-]{1,100})", re.ASCII)
_FILE = "queue.json"


class QueueError(ValueError):
    """A folder that is no queue, or a queue that cannot take what is added."""


@dataclass(frozen=True)
class JobQueue:
    """expiry: seconds without a sign of life after which a job is taken from its holder; the queue's own, on all machines."""

    root: Path
    expiry: float

    @classmethod
    def create(cls, root: Path, expiry: float = EXPIRY) -> JobQueue:
        """The queue at ``root``, made there if the folder is new or empty. Raises QueueError for any other folder."""
        if not MIN_EXPIRY <= expiry <= MAX_EXPIRY:
            raise QueueError(f"a claim lasts {MIN_EXPIRY:g} to {MAX_EXPIRY:g} seconds; {expiry:g} was asked for")
        if not (root / _FILE).is_file():
            _make(root, expiry)
        return cls.open(root)

    @classmethod
    def open(cls, root: Path) -> JobQueue:
        """The queue at ``root``. Raises QueueError when there is none."""
        try:
            with (root / _FILE).open("rb") as file:
                facts = json.loads(file.read(4096))
            expiry = float(facts["expiry"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise QueueError(
                f"{root} is no queue: it has no {_FILE} that can be read ({error}). `ltx2 batch FLOW... --queue DIR` makes one"
            ) from error
        if not MIN_EXPIRY <= expiry <= MAX_EXPIRY:
            raise QueueError(
                f"{root / _FILE}: expiry is {expiry:g}, allowed are {MIN_EXPIRY:g} to {MAX_EXPIRY:g} seconds"
            )
        return cls(root.resolve(), expiry)

    @property
    def heartbeat(self) -> float:
        """Seconds between two signs of life: a few may be late."""
        return self.expiry / 5

    def add(self, text: bytes, name: str, settings: Sequence[str] = ()) -> str:
        """Add a workflow; returns the job's name, a number and what letters of ``name`` are plain.

        Raises QueueError when the queue is full or the settings are too long.
        """
        noted = json.dumps(list(settings)).encode()
        if len(noted) > MAX_SETTINGS_BYTES:
            raise QueueError(f"settings of {len(noted)} bytes; at most {MAX_SETTINGS_BYTES} are kept")
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name, flags=re.ASCII)[:80] or "job"
        job = f"{self._number():05}_{plain}"
        made = self.root / "work" / f".{job}-{secrets.token_hex(4)}"
        made.mkdir()
        (made / WORKFLOW).write_bytes(text)
        (made / SETTINGS).write_bytes(noted)
        os.rename(made, self.root / "pending" / job)
        return job

    def _number(self) -> int:
        """The next number, which nobody else gets: a name is never used twice."""
        taken = [int(entry) for entry in os.listdir(self.root / "numbers") if _NUMBER.fullmatch(entry)]
        number = max(taken, default=0)
        while number < MAX_JOBS:
            number += 1
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.root / "numbers" / f"{number:05}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                return number
        raise QueueError(f"{self.root} has held {MAX_JOBS} jobs; make a new queue")

    def claim(self) -> Claim | None:
        """The first job that waits, now held by the caller; None when none does."""
        for name in self.names("pending"):
            claim = Claim(self.root, name, _holder())
            if claim.take():
                return claim
        return None

    def expire(self) -> list[str]:
        """Put back the jobs whose holders are silent, and drop what nobody will publish. Returns the jobs' names."""
        self._drop_orphans()
        claims = self._held()
        if not claims:
            return []
        now, silent = self._now(), []
        for claim in claims:
            if now - _last_sign(claim) > self.expiry:
                # its holder, or another worker that noticed, may be faster
                with contextlib.suppress(ClaimLost):
                    claim.put_back(blame=True)
                    silent.append(claim.name)
        return silent

    def names(self, state: str) -> list[str]:
        """Names of the jobs in a state, the oldest first. Entries of another form are none of ours."""
        if state == "running":
            return sorted(claim.name for claim in self._held())
        return sorted(entry for entry in os.listdir(self.root / state) if _NAME.fullmatch(entry))

    def is_finished(self) -> bool:
        """Whether no job waits or runs: one that runs may come back."""
        # twice: a job may be claimed between two looks
        return not (self.names("running") or self.names("pending") or self.names("running"))

    def _held(self) -> list[Claim]:
        return self._claims("running")

    def _claims(self, folder: str) -> list[Claim]:
        found = (_HELD.fullmatch(entry) for entry in os.listdir(self.root / folder))
        return [Claim(self.root, match[1], match[2]) for match in found if match]

    def _drop_orphans(self) -> None:
        """Remove what holders wrote whose claims are gone."""
        written = self._claims("work")
        held = set(self._held()) if written else set()  # listed later: a claim is there before its work is
        for claim in written:
            if claim not in held:
                shutil.rmtree(claim.work, ignore_errors=True)

    def _now(self) -> float:
        """The time by the file system's clock: those of the machines may differ."""
        probe = self.root / "work" / f".clock-{secrets.token_hex(8)}"
        try:
            with probe.open("xb") as file:
                os.utime(probe)
                return os.fstat(file.fileno()).st_mtime
        finally:
            probe.unlink(missing_ok=True)


def _make(root: Path, expiry: float) -> None:
    """A queue at ``root`` by one rename, whoever else makes it."""
    root.parent.mkdir(parents=True, exist_ok=True)
    made = root.with_name(f".{root.name}-{secrets.token_hex(4)}")
    for folder in (*STATES, "numbers", "work"):
        (made / folder).mkdir(parents=True)
    (made / _FILE).write_text(json.dumps({"expiry": expiry}) + "\n", encoding="utf-8")
    try:
        os.rename(made, root)
    except OSError as error:
        shutil.rmtree(made)
        if not (root / _FILE).is_file():
            raise QueueError(f"{root} is no queue and not an empty folder; name a new one ({error})") from error


def _holder() -> str:
    """Who holds a claim: machine, process, and what tells this claim from all others."""
    machine = re.sub(r"[^A-Za-z0-9.-]+", "-", platform.node(), flags=re.ASCII)[:60] or "machine"
    return f"{machine}-{os.getpid()}-{secrets.token_hex(6)}"


def _last_sign(claim: Claim) -> float:
    """When the holder last renewed its claim; long ago where there is no workflow, and just now where it cannot be read."""
    try:
        # opened, because a network file system then asks for the file's times instead of remembering them
        with claim.workflow.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return float("-inf")
    except OSError:
        # moved while we looked, or a file system that is away for a moment
        return float("inf")
