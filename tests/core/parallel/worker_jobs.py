"""The entry file of the workers of ``test_processes.py``: jobs that succeed, fail, wait and hang, by name."""

import os
import pathlib
import re
import sys
import threading
import time

PARALLEL = pathlib.Path(__file__).resolve().parents[3] / "ltx2_core" / "parallel"


class Jobs:
    def __init__(self, seat):
        self.seat = seat
        self.jobs = 0
        if os.environ.get("FAIL_ON_RANK") == str(seat.rank):
            raise RuntimeError("no such device")

    def run(self, job):
        self.jobs += 1
        if job.request.body.get("rank") not in (None, self.seat.rank):
            time.sleep(60)  # as in a collective, which the other rank never joins
        return getattr(self, job.request.name)(job, Result) or Result()

    def close(self):
        if os.environ.get("FAREWELL"):
            pathlib.Path(os.environ["FAREWELL"], str(self.seat.rank)).touch()

    def echo(self, job, result):
        job.progress({"step": 1}, {"preview": job.request.tensors["x"][:1]})
        return result({"rank": self.seat.rank, "jobs": self.jobs}, job.request.tensors)

    def about(self, job, result):
        status = pathlib.Path("/proc/self/status").read_text()
        return result(
            {
                "pid": os.getpid(),
                "environment": dict(os.environ),
                "path": sys.path,
                "modules": sorted(sys.modules),
                "descriptors": descriptors(),
                "threads": sorted(thread.name for thread in threading.enumerate()),
                "folder": str(self.seat.folder),
                "folder_mode": self.seat.folder.stat().st_mode & 0o777,
                "group_mode": self.seat.group_folder.stat().st_mode & 0o777,
                "resident": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024,
            }
        )

    def frames(self, job, result):
        frames = job.request.segment.tensor(job.request.placed["frames"])
        frames[self.seat.rank :: self.seat.size] = self.seat.rank + 1
        return result(placed=job.request.placed)

    def wait(self, job, result):
        for step in range(3000):
            job.enter_stage(f"step {step}")
            job.progress({"at": time.time()})
            time.sleep(0.02)
            job.check_interrupt()

    def refuse(self, job, result):
        job.enter_stage("check")
        raise ValueError("120 frames do not fit")

    def fail(self, job, result):
        job.enter_stage("sample")
        raise RuntimeError("out of memory")

    def hang(self, job, result):
        job.enter_stage("exchange")
        time.sleep(60)

    def hold_the_lock(self, job, result):
        job.enter_stage("deaf")
        re.match(r"(a+)+$", "a" * 60 + "b")

    def not_json(self, job, result):
        return result({"x": object()})


def descriptors():
    """What is behind each open descriptor beyond the standard three."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            if int(number) > 2:
                found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            pass  # the one that listed them
    return sorted(found)


if __name__ == "__main__":
    sys.path.insert(0, str(PARALLEL))
    from worker_entry import enter

    enter()

    from ltx2_engine.ltx2_core.parallel.worker_process import Result, serve

    serve(Jobs)
