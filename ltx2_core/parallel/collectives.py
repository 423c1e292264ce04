"""What ranks exchange, through a process group of torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

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


def join(rank: int, size: int, store: Path, *, backend: str, timeout: timedelta) -> None:
    """Meet the other ranks through a file that no earlier group has used, in a folder of the user alone.

    The environment says on which network interface (``GLOO_SOCKET_IFNAME``, ``NCCL_SOCKET_IFNAME``).
    """
    # a store on the file of an earlier group would hand on its values
    dist.init_process_group(
        backend, store=dist.FileStore(str(store), size), rank=rank, world_size=size, timeout=timeout
    )


def leave() -> None:
    """End all groups."""
    dist.destroy_process_group()


def subgroups(members: Sequence[Sequence[int]], rank: int) -> GroupCollectives:
    """Those among the ranks that are listed with this one. All ranks call it with the same lists, which share none."""
    groups = [dist.new_group(list(ranks)) for ranks in members]
    (own,) = [group for group, ranks in zip(groups, members, strict=True) if rank in ranks]
    return GroupCollectives(own)
