"""How Python runs while a model is loaded: without its garbage collector, and with threads that take quick turns.

Headers, modules and requests are hundreds of thousands of new objects, nearly all of which stay. They make the collector
come often and then look at every object of the program, of which a host with other packs has millions; meanwhile no
thread runs any Python, and readers and copies to the device stand still.

A reader that has a chunk needs Python for a moment, to have it copied and to begin the next. Whoever runs Python then may
go on for the switch interval, as long as reading a whole chunk takes, unless that interval is short.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading

_SWITCH_SECONDS = 0.001
# the interpreter counts whole microseconds and cuts off what is less, also where only a rounding error is missing
_HALF_A_MICROSECOND = 5e-7


class _WhileLoading(contextlib.ContextDecorator):
    """Runs Python in that way while any thread is inside, for blocks (``with``) and functions (as a decorator).

    The last to leave puts everything back to what it was when the first came. ``gc.collect`` works all the time.
    """

    def __init__(self) -> None:
        # nothing that is done under it makes the collector come, whose finalisers might want it too
        self._lock = threading.Lock()
        self._inside = 0
        self._was_on = False
        self._switch_seconds = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._was_on, self._switch_seconds = gc.isenabled(), sys.getswitchinterval()
                gc.disable()
                _switch_after(min(self._switch_seconds, _SWITCH_SECONDS))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _switch_after(self._switch_seconds)
                if self._was_on:
                    _grow_old()
                    gc.enable()


def _grow_old() -> None:
    """Have the collector take everything for old, or it would at once look at all that the load has made."""
    # what somebody has frozen stays so
    if not gc.get_freeze_count():
        gc.freeze()
        gc.unfreeze()


def _switch_after(seconds: float) -> None:
    sys.setswitchinterval(seconds + _HALF_A_MICROSECOND)


# the one that all loads share
while_loading = _WhileLoading()
