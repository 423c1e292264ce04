"""Processes that compute something together, for tests of ranks: ``run_together`` has them, each a fork of this script.

python together.py LOGS SCRIPT ARGUMENT... [-- SCRIPT ARGUMENT...]...

PyTorch is imported once, before there are any threads, and not by every rank. The first argument is a folder for what the
processes print, in files 0, 1 and so on.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 150
_POLL_SECONDS = 0.05


def run_together(commands, descriptors=()):
    """Run Python scripts side by side, one thread each, over loopback, until all are done; those that fail are told.

    commands: what a process is called, and its script and arguments. descriptors: files that all of them inherit.
    """
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = [word for command in commands.values() for word in ("--", *map(str, command))]
        process = subprocess.Popen(
            [sys.executable, __file__, folder, *words[1:]],
            env=environment,
            pass_fds=descriptors,
            stdout=subprocess.PIPE,
        )
        try:
            codes = process.communicate(timeout=2 * SECONDS)[0].split()
        finally:
            # it kills its own
            process.terminate()
            process.wait()
        assert len(codes) == len(commands), f"processes could not be started ({process.returncode})"
        failed = [
            f"{name} ended with {int(code)}:\n{Path(folder, str(number)).read_text()[-4000:]}"
            for number, (name, code) in enumerate(zip(commands, codes, strict=True))
            if int(code)
        ]
        assert not failed, "\n".join(failed)


def main(folder, commands):
    """Run all commands, kill those that are not done in time, and print their exit codes."""
    import torch.distributed  # noqa: F401

    running = {_fork(Path(folder, str(number)), command): number for number, command in enumerate(commands)}
    codes, deadline = {}, time.monotonic() + SECONDS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        while len(codes) < len(running) and time.monotonic() < deadline:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[pid] = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(_POLL_SECONDS)
    finally:
        for pid in running.keys() - codes.keys():
            os.kill(pid, signal.SIGKILL)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(*(codes[pid] for pid in running))


def _fork(log, command):
    """A process that runs a script as Python would; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # also what libraries print
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = command
        sys.path[0] = str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    words, commands = sys.argv[2:], [[]]
    for word in words:
        if word == "--":
            commands.append([])
        else:
            commands[-1].append(word)
    main(sys.argv[1], commands)
