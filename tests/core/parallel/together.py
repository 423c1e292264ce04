"""Processes that compute something together, for tests of ranks."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 150


def run_together(commands, descriptors=()):
    """Run Python scripts side by side, one thread each, over loopback, until all are done; those that fail are told.

    commands: what a process is called, and its script and arguments. descriptors: files that all of them inherit.
    """
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(number)) for number in range(len(commands))]
        running = []
        try:
            for log, command in zip(logs, commands.values(), strict=True):
                with log.open("wb") as output:
                    options = {"env": environment, "pass_fds": descriptors, "stdout": output, "stderr": output}
                    running.append(subprocess.Popen([sys.executable, *map(str, command)], **options))
            with contextlib.suppress(subprocess.TimeoutExpired):
                for process in running:
                    process.wait(SECONDS)
        finally:
            for process in running:
                # who is not done in time ends with -9
                process.kill()
                process.wait()
        told = zip(commands, running, logs, strict=True)
        failed = [
            f"{name} ended with {p.returncode}:\n{log.read_text()[-4000:]}" for name, p, log in told if p.returncode
        ]
        assert not failed, "\n".join(failed)
