"""One process serves a queue: it claims a job, runs it, publishes its output, and takes the next."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...ltx2_core.host import Interrupted
from .claim import Claim, ClaimLost, Heartbeat
from .execute import NodeFailed
from .job_queue import JobQueue
from .session import Session
from .workflow import WorkflowError, read_workflow

_LOG = logging.getLogger("ltx2.queue")

# a job that its holders did not survive so often is what kills them
MAX_SILENT_HOLDERS = 3
POLL = 0.5


class LeftToOthers(Interrupted):
    """Another worker has the job that runs here, so it stops."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job here. state: ``running`` (it begins), ``done``, ``failed``, ``lost`` or ``returned``."""

    job: str
    state: str
    seconds: float = 0.0
    files: tuple[Path, ...] = ()
    reason: str = field(default="", repr=False)


Report = Callable[[Outcome], None]


def serve(queue: JobQueue, session: Session, report: Report, *, wait: bool = False) -> None:
    """Run jobs of ``queue`` until none waits or runs anywhere; with ``wait``, until interrupted.

    ``report`` is called when a job begins and ends. Raises Interrupted when the user stops it; the job that ran then
    waits in the queue again.
    """
    while True:
        claim = next_claim(queue)
        if claim is not None:
            run_claim(claim, queue, session, report)
        elif not wait and queue.is_finished():
            return
        else:
            time.sleep(min(POLL, queue.heartbeat))
        session.host.check_interrupt()


def next_claim(queue: JobQueue) -> Claim | None:
    """The next job, after those of silent holders have been put back."""
    for name in queue.expire():
        _LOG.warning("%s: its holder gave no sign of life for %g s; it is run again", name, queue.expiry)
    return queue.claim()


def run_claim(claim: Claim, queue: JobQueue, session: Session, report: Report) -> None:
    """Run one claimed job to an end that ``report`` is told. Raises Interrupted, with the job back in the queue."""
    start = time.monotonic()
    report(Outcome(claim.name, "running"))
    try:
        with Heartbeat(claim, queue.heartbeat) as heartbeat:
            session.host.give_up = lambda: LeftToOthers() if heartbeat.lost else None
            outcome = _run(claim, session)
    except (ClaimLost, LeftToOthers):
        outcome = Outcome(claim.name, "lost")
    except (Interrupted, KeyboardInterrupt):
        give_back(claim, report)
        raise
    finally:
        session.host.give_up = None
    report(replace(outcome, seconds=time.monotonic() - start))


def _run(claim: Claim, session: Session) -> Outcome:
    try:
        check_holders(claim.begin())
        result = session.run(read_workflow(claim.workflow), claim.work, claim.settings())
        saved = [path.relative_to(claim.work) for path in result.files if path.is_relative_to(claim.work)]
        published = claim.commit()
        return Outcome(claim.name, "done", files=tuple(published / path for path in saved))
    except FAILURES as error:
        return failed(claim, reason_of(error))


def failed(claim: Claim, reason: str) -> Outcome:
    """The outcome of a job that is now among the failed ones. Raises ClaimLost."""
    return Outcome(claim.name, "failed", files=(claim.fail(reason),), reason=reason)


def give_back(claim: Claim, report: Report, *, blame: bool = False) -> None:
    """Let the job wait again; ``blame`` as in ``Claim.put_back``."""
    with contextlib.suppress(ClaimLost):
        claim.put_back(blame=blame)
    report(Outcome(claim.name, "returned"))


class TooManyHolders(RuntimeError):
    """Worker after worker went silent with the same job."""


# the others are ValueErrors: WorkflowError, OptionError, PathError
FAILURES = (NodeFailed, TooManyHolders, ValueError, OSError)


def check_holders(earlier: list[str]) -> None:
    """Raise TooManyHolders for a job that was the last one of several workers."""
    if len(earlier) >= MAX_SILENT_HOLDERS:
        raise TooManyHolders(
            f"{len(earlier)} workers went silent while they ran this job: {', '.join(earlier)}. It may need more memory "
            "than they have; to try again, add it to the queue"
        )


def reason_of(error: BaseException) -> str:
    """What a user is told about a failed job."""
    return "\n".join(error.lines()) if isinstance(error, WorkflowError) else str(error) or type(error).__name__
