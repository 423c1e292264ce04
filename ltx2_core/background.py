"""Work of one component in a thread of its own, that the node's thread starts, watches and joins.

The thread never calls the host: it is handed plain callables, counts what it has done, and looks at a flag.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from .host import Interrupted

T = TypeVar("T")

_POLL_SECONDS = 0.02


class Background(Generic[T]):
    """Runs ``work(self)`` in a thread on ``device``; ``done_bytes`` is its progress.

    after: work that has to end first, whether it succeeds or not. interrupted: read-only flag of the host.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Background[T]], T],
        *,
        device: torch.device,
        after: Background | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ):
        self.done_bytes = 0
        self._work, self._device, self._after, self._interrupted = work, device, after, interrupted
        self._stop = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"ltx2 {name}", daemon=True)
        self._thread.start()

    # for the thread

    def count(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes

    def stopped(self) -> bool:
        return self._stop.is_set() or self._interrupted()

    def _run(self) -> None:
        try:
            while self._after is not None and not self._after.join(_POLL_SECONDS):
                if self.stopped():
                    raise Interrupted("the work was stopped")
            self._after = None
            with _on(self._device), torch.no_grad():
                self._result = self._work(self)
        except BaseException as error:
            # it belongs to whoever asks for the result
            self._error = error

    # for everybody else

    def join(self, seconds: float | None = None) -> bool:
        """Wait at most so long; whether the work is over."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stop the work and wait until its thread is gone."""
        self._stop.set()
        self._thread.join()

    def result(self, watch: Callable[[int], None]) -> T:
        """Wait for the work while calling ``watch`` with the bytes done; what it raises stops the work.

        Raises what the work raised.
        """
        try:
            while not self.join(_POLL_SECONDS):
                watch(self.done_bytes)
        except BaseException:
            self.stop()
            raise
        if self._error is not None:
            raise self._error
        watch(self.done_bytes)
        return self._result  # type: ignore[return-value]


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """The thread's device, with a stream of its own that is finished when the block ends."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        # weights that are replaced may still be read by what the node's thread asked for
        stream.wait_stream(torch.cuda.default_stream(device))
        try:
            yield
        finally:
            stream.synchronize()
