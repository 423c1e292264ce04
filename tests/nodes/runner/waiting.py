"""Waiting for other processes."""

import time


def wait_for(found, seconds=120):
    """What ``found`` gives as soon as that is something."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        result = found()
        if result:
            return result
        time.sleep(0.02)
    raise AssertionError(f"it did not happen within {seconds} s")
