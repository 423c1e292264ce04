"""One of four ranks: decodes its rows of every clip with the others, straight into memory that all of them share.

python band_rank.py RANK FOLDER DESCRIPTOR [DESCRIPTOR]

The memory holds the clips one behind the other: the first for two ranks, which have the larger numbers, the second for
all four.
"""

import contextlib
import sys
import types
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SIZES = (2, 4)
# of the check at which the first rank of a group is told to stop
STOP_AT = 9


def main(rank: int, folder: Path, descriptors: list[int]) -> None:
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [str(ROOT)]
    sys.modules["ltx2_engine"] = package

    import band_cases
    import torch
    from ltx2_engine.ltx2_core.parallel.bands import Bands, deal
    from ltx2_engine.ltx2_core.parallel.collectives import GroupCollectives, connect, join, leave, neighbours
    from ltx2_engine.ltx2_core.parallel.groups import Topology
    from ltx2_engine.ltx2_core.parallel.placement import total_bytes
    from ltx2_engine.ltx2_core.parallel.shared_memory import Segment

    torch.set_num_threads(1)
    join(rank, max(SIZES), folder / "store", backend="gloo", timeout=timedelta(seconds=60))
    places = band_cases.places()
    for size, descriptor in zip(SIZES, descriptors, strict=True):
        group = connect(rank, Topology(max(SIZES) // size, size))[0].exchange.group
        place, edges = rank % size, neighbours(torch.device("cpu"), group)
        if rank // size < max(SIZES) // size - 1:
            continue

        def told_to_stop(checks: list[int], group=group, place=place) -> None:
            """As ranks that wait for each other do: all of them hear at the same place what one of them was told."""
            checks.append(1)
            told = GroupCollectives(group).all_gather(torch.tensor([len(checks) == STOP_AT and place == 0]))
            if bool(told[0]):
                raise InterruptedError

        with Segment(descriptor, total_bytes(places)) as segment:
            for number, (name, case) in enumerate(band_cases.CASES.items()):
                bands, checks = Bands(place, deal(case.rows, size), edges), []
                if not number:
                    with contextlib.suppress(InterruptedError):
                        band_cases.decode(case, bands, check=lambda checks=checks: told_to_stop(checks))
                    assert len(checks) == STOP_AT
                band_cases.decode(case, bands, segment.tensor(places[name]))
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), [int(descriptor) for descriptor in sys.argv[3:]])
