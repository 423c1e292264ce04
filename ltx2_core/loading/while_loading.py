"""How Python runs while a model is loaded: without its garbage collector.

Headers, modules and requests are hundreds of thousands of new objects, nearly all of which stay. They make the collector
come often and then look at every object of the program, of which a host with other packs has millions; meanwhile no
thread runs any Python, and readers and copies to the device stand still.
"""

from __future__ import annotations

import contextlib
import gc
import threading


class _WhileLoading(contextlib.ContextDecorator):
    """Runs Python in that way while any thread is inside, for blocks (``with``) and functions (as a decorator).

    The last to leave puts everything back to what it was when the first came. ``gc.collect`` works all the time.
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
                _grow_old()
                gc.enable()


def _grow_old() -> None:
    """Have the collector take everything for old, or it would at once look at all that the load has made."""
    # what somebody has frozen stays so
    if not gc.get_freeze_count():
        gc.freeze()
        gc.unfreeze()


# the one that all loads share
while_loading = _WhileLoading()
