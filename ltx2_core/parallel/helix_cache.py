"""A rank's share of the keys and values of a sequence, behind transformers' cache interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .helix import OwnerMap

_SLACK = 256  # positions of room that a full buffer is given, so that a token does not copy all others


class OwnedKeys(CacheLayerMixin):
    """One layer's keys and values at the positions that this rank owns, after rotation.

    It reports the length of the whole sequence, so positions and masks come out as on one rank; who attends takes the
    columns of ``positions`` from the mask. reach: how many positions back the layer sees, itself included; None for all.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, owners: OwnerMap, reach: int | None = None) -> None:
        super().__init__()
        self.owners, self.reach = owners, reach
        # transformers makes the mask of windows for the first layer that says so
        self.is_sliding = reach is not None
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self._start = self._length = self._base = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep what this rank owns of the next positions' keys and values, [B, H, T, D].

        Returns all owned ones that these positions may see, [B, H, S, D] in the order of ``positions``; S may be 0.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        first, self._length = self._length, self._length + key_states.shape[-2]
        self._start = self._seen_from(first)
        begin, held, end = (self.owners.count(p) - self._base for p in (self._start, first, self._length))
        if end > held:
            new = self._owned(first)
            key_states, value_states = key_states[:, :, new], value_states[:, :, new]
            if end > self.keys.shape[2]:
                return self._move(slice(begin, held), key_states, value_states)
            self.keys[:, :, held:end] = key_states
            self.values[:, :, held:end] = value_states
        return self.keys[:, :, begin:end], self.values[:, :, begin:end]

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """The position of each key that the last update returned, int64."""
        return self.owners.positions(self._start, self._length, device)

    @property
    def is_whole(self) -> bool:
        """Whether the last update returned the keys of every position."""
        return self.owners.ranks == 1 and self._start == 0

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def _seen_from(self, position: int) -> int:
        """The first position that a token at ``position`` sees."""
        return 0 if self.reach is None else max(position - self.reach + 1, 0)

    def _owned(self, first: int) -> slice | Tensor:
        """Which of the newest positions, from ``first`` on, this rank owns."""
        if self.owners.ranks == 1 or self._length - first == 1:
            return slice(None)
        assert self.keys is not None
        return self.owners.positions(first, self._length, self.keys.device) - first

    def _move(self, seen: slice, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        """Append to what is still seen, and keep what the next token will see, with room for more."""
        assert self.keys is not None
        assert self.values is not None
        keys = torch.cat([self.keys[:, :, seen], new_keys], dim=2)
        values = torch.cat([self.values[:, :, seen], new_values], dim=2)
        self._base = self.owners.count(self._seen_from(self._length))
        gone = self._base - self.owners.count(self._start)
        self.keys, self.values = _with_room(keys[:, :, gone:]), _with_room(values[:, :, gone:])
        return keys, values


def _with_room(kept: Tensor) -> Tensor:
    buffer = kept.new_empty(*kept.shape[:2], kept.shape[2] + _SLACK, kept.shape[3])
    buffer[:, :, : kept.shape[2]] = kept
    return buffer
