"""The exchanges of ``helix_exchange`` over process groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch import Tensor

from .collectives import GroupCollectives
from .helix_exchange import Alone, Exchange
from .helix_topology import Ranks, Topology

# the names since PyTorch 2.13 and before it, of which the older warns there
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class GroupExchange(GroupCollectives):
    """``helix_exchange.Exchange`` in a process group (NCCL, or Gloo on the CPU) that this process belongs to."""

    @cached_property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @cached_property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def all_to_all(self, parts: Tensor) -> Tensor:
        return super().all_to_all(parts.contiguous())

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        summed = parts.new_empty(parts[0].numel())
        _reduce_scatter(summed, parts.reshape(-1), group=self.group)
        return summed.view(parts.shape[1:])

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x


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
