"""What processes have: sockets, open files, lives. For tests of workers."""

import contextlib
import os
import threading
import time
from pathlib import Path

import psutil


class Sockets(threading.Thread):
    """Every TCP and UDP socket that this process or a descendant was seen with."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen, self.done = set(), threading.Event()
        self.start()

    def run(self):
        while not self.done.wait(0.1):
            self.seen |= internet_sockets()


def internet_sockets():
    of_the_host = {
        line.split()[9]: f"{kind} {line}"
        for kind in ("tcp", "tcp6", "udp", "udp6")
        for line in Path("/proc/net", kind).read_text().splitlines()[1:]
    }
    ours = {link[8:-1] for pid in descendants(os.getpid()) for link in links(pid) if link.startswith("socket:[")}
    return {of_the_host[inode] for inode in ours & of_the_host.keys()}


def links(pid):
    with contextlib.suppress(OSError):  # it has ended
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(entry.path)


def open_files():
    """What this process has open, without what the other thread reads about processes."""
    return sorted(link for link in links(os.getpid()) if not link.startswith("/proc/"))


def descendants(pid):
    """The process and all that it has started, and those have."""
    yield pid
    with contextlib.suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from descendants(int(child))


def alive(pid):
    """Whether a process of this number runs; one that has ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def after(seconds, action):
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer
