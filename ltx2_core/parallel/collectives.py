"""What ranks exchange, through a process group of torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .context import ParallelContext
from .groups import PassGroups, Topology

# two names of one function, of which the older warns where there is the newer
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class GroupCollectives:
    """``context.Collectives`` of one process group; None is that of all ranks."""

    group: dist.ProcessGroup | None = None

    def all_to_all(self, x: Tensor) -> Tensor:
        """A piece [...] of x [P, ...] to every rank."""
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self.group)
        return received

    def all_gather(self, x: Tensor) -> Tensor:
        """x [...] of every rank as [P, ...]."""
        # Gloo wants results end to end
        gathered = x.new_empty(dist.get_world_size(self.group) * x.numel())
        _all_gather(gathered, x.flatten(), group=self.group)
        return gathered.view(-1, *x.shape)


@dataclass(frozen=True)
class GroupNeighbours:
    """``bands.Neighbours`` in a process group, whose ranks have the bands from top to bottom; None is that of all ranks."""

    group: dist.ProcessGroup | None = None

    def exchange_edges(self, top: Tensor | None, bottom: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """One message to each neighbour and one from it, all at once: none waits for another's turn."""
        rank = dist.get_rank(self.group)
        above, below = (None if edge is None else torch.empty_like(edge) for edge in (top, bottom))
        operations = [
            dist.P2POp(operation, edge, self._global(place), self.group)
            for place, sent, received in ((rank - 1, top, above), (rank + 1, bottom, below))
            for operation, edge in ((dist.isend, sent), (dist.irecv, received))
            if edge is not None
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return above, below

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def neighbours(device: torch.device, group: dist.ProcessGroup | None = None) -> GroupNeighbours:
    """Neighbours that exchange edges on ``device``. All ranks of the group call it.

    They exchange something at once: NCCL wants all of them in a group's first exchange, and some may have no rows.
    """
    GroupCollectives(group).all_gather(torch.zeros(1, device=device))
    return GroupNeighbours(group)


def join(
    rank: int, size: int, store: Path, *, backend: str, timeout: timedelta, device: torch.device | None = None
) -> None:
    """Meet the other ranks through a file that no earlier group has used, in a folder of the user alone.

    device: the GPU of this rank, for NCCL. The environment says on which network interface (``GLOO_SOCKET_IFNAME``,
    ``NCCL_SOCKET_IFNAME``).
    """
    # a store on the file of an earlier group would hand on its values
    fresh = dist.FileStore(str(store), size)
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=timeout, device_id=device)


def join_by_environment(backend: str, timeout: timedelta, device: torch.device | None) -> None:
    """Meet the other ranks where the variables of torchrun say, on the network interfaces that the administrator chose.

    device: the GPU of this rank, for NCCL.
    """
    dist.init_process_group(backend, init_method="env://", timeout=timeout, device_id=device)


def open_meeting(address: str) -> tuple[object, int]:
    """A place on a free port of this machine where ranks can meet by environment, for as long as it is held; its port.

    Rank 0, in whose process it is, joins it like the others. It listens on all interfaces.
    """
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    return store, store.port


def leave() -> None:
    """End all groups."""
    dist.destroy_process_group()


class Control:
    """Short words between all ranks, over Gloo, whatever carries their tensors."""

    _WORD_BYTES = 4096

    def __init__(self, timeout: timedelta) -> None:
        """All ranks make one at the same time. timeout: how long a word of another rank is waited for."""
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def exchange(self, word: bytes) -> list[bytes]:
        """The word of every rank, in their order. Longer ones than 4 KiB are cut off."""
        mine = torch.zeros(self._WORD_BYTES, dtype=torch.uint8)
        word = word[: self._WORD_BYTES]
        mine[: len(word)] = torch.frombuffer(bytearray(word), dtype=torch.uint8)
        return [bytes(row.tolist()).rstrip(b"\0") for row in GroupCollectives(self._group).all_gather(mine)]


def broadcast(x: Tensor, source: int = 0) -> None:
    """Give all ranks what one has in a contiguous tensor, in place."""
    dist.broadcast(x, src=source)


def connect(rank: int, topology: Topology) -> tuple[ParallelContext, PassGroups]:
    """Where a rank stands in both kinds of groups. All ranks call it, for the same topologies in the same order."""
    group, place = divmod(rank, topology.ulysses)
    within, across = ([_group(ranks) for ranks in members] for members in (topology.within, topology.across))
    return (
        ParallelContext(place, topology.ulysses, within[group]),
        PassGroups(group, topology.groups, across[place]),
    )


def _group(ranks: tuple[int, ...]) -> GroupCollectives | None:
    """None for a rank by itself, which exchanges nothing."""
    return GroupCollectives(dist.new_group(list(ranks))) if len(ranks) > 1 else None
