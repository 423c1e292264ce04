"""One rank: computes every case with the others and writes what it has got.

python rank.py RANK SIZE FOLDER
"""

import contextlib
import sys
import types
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def main(rank: int, size: int, folder: Path) -> None:
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [str(ROOT)]
    sys.modules["ltx2_engine"] = package

    import cases
    import torch
    from ltx2_engine.ltx2_core.parallel.collectives import GroupCollectives, connect, join, leave
    from ltx2_engine.ltx2_core.parallel.context import SINGLE, ParallelContext
    from ltx2_engine.ltx2_core.parallel.groups import Topology
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    context = SINGLE
    if size > 1:
        join(rank, size, folder / f"store-{size}", backend="gloo", timeout=timedelta(seconds=60))
        context = ParallelContext(rank, size, GroupCollectives())
    with torch.inference_mode(), contextlib.ExitStack() as at_the_end:
        if size > 1:
            at_the_end.callback(leave)
        results = cases.attentions(context) | cases.evaluations(context)
        for groups in (count for count in range(1, size + 1) if size % count == 0):
            topology = Topology(groups, size // groups)
            guided = cases.guided(*connect(rank, topology))
            results |= {f"guided/{groups}x{topology.ulysses}/{name}": value for name, value in guided.items()}
    # contiguous copies, each in memory of its own
    save_file({name: value.clone().contiguous() for name, value in results.items()}, folder / f"{size}-{rank}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
