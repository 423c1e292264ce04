"""Python's garbage collector waits while a model is loaded.

Headers, modules and requests are hundreds of thousands of new objects, nearly all of which stay. They make the collector
come often and then look at every object of the program, of which a host with other packs has millions; meanwhile no
thread runs any Python, and readers and copies to the device stand still.
"""

from __future__ import annotations

import contextlib
import gc
import threading


class _Pause(contextlib.ContextDecorator):
    """No automatic collection as long as any thread is inside, for blocks (``with``) and functions (as a decorator).

    The last to leave switches the collector on again if it was on when the first came. ``gc.collect`` works all the time.
    """

    def __init__(self) -> None:
        # nothing that is done under it makes the collector come, whose finalisers might want it too
        self._lock = threading.Lock()
        self._inside = 0
        self._was_on = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._was_on = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._was_on:
                gc.enable()


# the one that all loads share
collector_paused = _Pause()
