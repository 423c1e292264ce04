"""The exchanges of ``helix_exchange`` over process groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .helix_exchange import Alone, Exchange
from .helix_topology import Ranks, Topology


class GroupExchange:
    """Exchanges in a process group (NCCL, or Gloo on the CPU) that this process belongs to."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def all_to_all(self, parts: Tensor) -> Tensor:
        parts = parts.contiguous()
        received = parts.new_empty(parts.shape)
        dist.all_to_all_single(received, parts, group=self._group)
        return received

    def all_gather(self, x: Tensor) -> Tensor:
        received = x.new_empty(self.size * x.numel())
        _all_gather(received, x.reshape(-1), group=self._group)
        return received.view(self.size, *x.shape)

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        summed = parts.new_empty(parts[0].numel())
        _reduce_scatter(summed, parts.reshape(-1), group=self._group)
        return summed.view(parts.shape[1:])

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=self._group)
        return x


# the names since PyTorch 2.13; those before it warn there
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor


def connect(topology: Topology, members: Sequence[int] | None = None) -> Ranks | None:
    """The groups of a topology among ``members`` (default: all processes); None in a process that is not a member.

    Every process of the default group calls this, members or not. Raises ValueError when the topology needs another
    number of processes.
    """
    members = range(dist.get_world_size()) if members is None else members
    if len(members) != topology.size:
        raise ValueError(f"{topology.name} needs {topology.size} processes, there are {len(members)}")
    everyone = _join(members)
    contexts = [_join(members[first : first + topology.context]) for first in topology.context_groups]
    context = next((group for group in contexts if group is not None), None)
    return None if everyone is None or context is None else Ranks(topology, everyone, context)


def _join(members: Sequence[int]) -> Exchange | None:
    """A new group's exchanges; None for who is not in it. One member alone needs no group."""
    if len(members) == 1:
        return Alone() if dist.get_rank() in members else None
    group = dist.new_group(list(members))
    return GroupExchange(group) if dist.get_rank() in members else None
