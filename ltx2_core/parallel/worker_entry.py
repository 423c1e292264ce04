"""The first lines of a worker process. It imports nothing of the pack before it has placed it.

A worker's own file, which is started by path, calls ``enter`` and then ``worker_process.serve`` with its handler:
``ENTRY DESCRIPTOR RANK SIZE GENERATION PARENT FOLDER``, as ``processes.py`` writes it.
"""

import pathlib
import sys
import types


def place_pack() -> None:
    """Make ``ltx2_engine`` a package over the pack's folder, as the root ``__init__`` does in the host."""
    here = pathlib.Path(__file__).resolve().parent
    # this folder has names such as messages.py: none of them is for everybody
    sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != here]
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [str(here.parents[1])]
    sys.modules["ltx2_engine"] = package


def enter() -> None:
    """What comes before any other import: the pack's place, and the worker's end when its parent ends."""
    place_pack()

    from ltx2_engine.ltx2_core.parallel.parent_death import die_with_parent

    die_with_parent(int(sys.argv[5]))
