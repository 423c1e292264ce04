"""The entry file of a fleet's workers that fail where a test wants it: as ``parallel/worker.py``, with faults.

The file that ``LTX2_TEST_FAULT`` names says which: a JSON object with a rank and a place. ``LTX2_TEST_ONE_GPU``: ranks share a
GPU, which NCCL lets those of several hosts do, so each gets a host's name of its own.
"""

import json
import os
import pathlib
import sys
import threading
import time

PARALLEL = pathlib.Path(__file__).resolve().parents[3] / "ltx2_core" / "parallel"


def fault(place):
    """What shall go wrong at this place on this rank, if anything."""
    file = pathlib.Path(os.environ["LTX2_TEST_FAULT"])
    wanted = json.loads(file.read_text()) if file.exists() else {}
    return (wanted.get("rank"), wanted.get("place")) == (int(os.environ["RANK"]), place)


def plant_faults():
    from ltx2_engine.ltx2_core.engine import LocalEngine
    from ltx2_engine.ltx2_core.host import HostOutOfMemory
    from ltx2_engine.ltx2_core.loading import ring
    from ltx2_engine.ltx2_core.parallel.sharing import Sharing
    from ltx2_engine.ltx2_core.transformer.model import Transformer

    placed, run_passes = LocalEngine._placed, Transformer.run_passes

    def short_of_memory(self, *args):
        if fault("before the first step"):
            raise HostOutOfMemory("the transformer does not fit")
        return placed(self, *args)

    def out_of_memory(self, *args, **options):
        if fault("in a step"):
            raise RuntimeError("CUDA out of memory")
        return run_passes(self, *args, **options)

    read_at, close = ring._read_at, Sharing.close

    def failing_disk(*args):
        # of what ranks share, not of the text encoder
        if fault("in a file") and any(thread.name == "ltx2 sharing" for thread in threading.enumerate()):
            raise OSError(5, "Input/output error")
        if fault("slow file"):
            time.sleep(0.3)
        return read_at(*args)

    def noted(self):
        close(self)
        # for the test: how many parts each reading has given
        file = pathlib.Path(os.environ["LTX2_TEST_FAULT"]).with_name(f"given-{self.rank}")
        file.write_text(str(self.given()))

    LocalEngine._placed, Transformer.run_passes = short_of_memory, out_of_memory
    ring._read_at, Sharing.close = failing_disk, noted


if __name__ == "__main__":
    if "LTX2_TEST_ONE_GPU" in os.environ:
        os.environ["NCCL_HOSTID"] = os.environ["RANK"]
    sys.path.insert(0, str(PARALLEL))
    from worker_entry import enter

    enter()

    from ltx2_engine.ltx2_core.fleet.handler import EngineJobs
    from ltx2_engine.ltx2_core.parallel.worker_process import serve

    plant_faults()
    serve(EngineJobs)
