"""Work of one component in a thread of its own, that the node's thread starts, watches and joins.

The thread never calls the host: it is handed plain callables, counts what it has done, and looks at a flag.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from .host import Interrupted

log = logging.getLogger("ltx2.engine")

T = TypeVar("T")

_POLL_SECONDS = 0.02
# what the names of all threads of the pack begin with
_OURS = "ltx2 "


class Background(Generic[T]):
    """Runs ``work(self)`` in a thread on ``device``; ``name`` says what it does, ``done_bytes`` is its progress.

    after: work that has to end first, whether it succeeds or not; an interrupt of whoever waits for it ends this one too.
    interrupted: read-only flag of the host. ended: called by the thread when the work is over, or was given up before it began.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Background[T]], T],
        *,
        device: torch.device,
        after: Background | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        ended: Callable[[], object] = lambda: None,
    ):
        self.name = name
        self.done_bytes = 0
        self._device, self._after, self._interrupted = device, after, interrupted
        self._stop = threading.Event()
        self._given_up = False
        # whether an interrupt ended the work, of which the host may know nothing any more
        self.was_interrupted = False
        self._result: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work, ended), name=_OURS + name, daemon=True)
        self._thread.start()

    # for the thread

    def count(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes

    def stopped(self) -> bool:
        return self._stop.is_set() or self._interrupted()

    def _run(self, work: Callable[[Background[T]], T], ended: Callable[[], object]) -> None:
        try:
            self._wait_for_others()
            with _on(self._device), torch.no_grad():
                self._result = work(self)
        except BaseException as error:
            if not isinstance(error, (Interrupted, OSError, ValueError)):
                log.error("%s failed", self.name, exc_info=True)
            # it belongs to whoever asks for the result, but the tensors that its frames hold to nobody
            self._error = _without_traceback(error)
            self.was_interrupted = isinstance(error, Interrupted) and not self._stop.is_set()
        finally:
            ended()

    def _wait_for_others(self) -> None:
        after, self._after = self._after, None
        while after is not None and not after.join(_POLL_SECONDS):
            if self.stopped():
                raise Interrupted("the work was stopped")
        if after is not None and (after._given_up or after.was_interrupted):
            raise Interrupted("the work before this was interrupted")

    # for everybody else

    def join(self, seconds: float | None = None) -> bool:
        """Wait at most so long; whether the work is over."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stop the work and wait until its thread is gone.

        The collector may call this in any thread. Those of the pack do not wait: it may be for themselves.
        """
        self._stop.set()
        if not threading.current_thread().name.startswith(_OURS):
            self._thread.join()

    def result(self, watch: Callable[[int], None]) -> T:
        """Wait for the work while calling ``watch`` with the bytes done; what it raises stops the work.

        Raises what the work raised.
        """
        try:
            while not self.join(_POLL_SECONDS):
                watch(self.done_bytes)
        except BaseException:
            self._given_up = True
            self.stop()
            raise
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # an error that this frame refers to would live, with all that its frames hold, until the collector comes
                del error
        watch(self.done_bytes)
        return self._result  # type: ignore[return-value]


def _without_traceback(error: BaseException) -> BaseException:
    before = error.__cause__ or error.__context__
    if before is not None:
        _without_traceback(before)
    return error.with_traceback(None)


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """The thread's device, with a stream that is not the node's and is finished when the block ends."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(torch.cuda.current_device() if device.index is None else device.index)
    with torch.cuda.stream(stream):
        # weights that are replaced may still be read by what the node's thread asked for
        stream.wait_stream(torch.cuda.default_stream(device))
        try:
            yield
        finally:
            stream.synchronize()


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    """One a device for good: freed memory and the workspaces of matrix products are kept for their stream."""
    return torch.cuda.Stream(torch.device("cuda", index))
