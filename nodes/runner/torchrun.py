"""What torchrun tells a process: its place among the ranks of one video. Its rendezvous is the administrator's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A process among those that torchrun has started; ``local``: among those of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def of_environment(cls) -> Place | None:
        """This process's place; None where torchrun has not started it."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return None
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(os.environ[name]) for name in names))

    def take_gpu(self) -> None:
        """See one GPU of the machine only, whatever device a workflow names. Before torch looks for GPUs."""
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = [str(index) for index in range(self.local_size)] if listed is None else listed.split(",")
        if self.local_rank < len(visible):
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[self.local_rank]


@contextlib.contextmanager
def joined(place: Place) -> Iterator[None]:
    """Engines that are opened inside sample with all ranks. Raises ValueError for ranks that cannot work together."""
    from ...ltx2_core.parallel.collectives import leave
    from ...ltx2_core.ranks import use_ranks
    from ...ltx2_core.torchrun import TorchrunRanks

    with use_ranks(TorchrunRanks(place.rank, place.size, place.local_size)):
        yield
    # after an error the others may wait in an exchange: torchrun ends them, and nobody waits here
    leave()
