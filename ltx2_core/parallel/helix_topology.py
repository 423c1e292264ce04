"""How a decoder's attention and weights are shared by ranks: one GPU, tensor parallel, or Helix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .helix_exchange import Alone, Exchange


@dataclass(frozen=True)
class Attention:
    """``layers`` attentions of one kind. reach: how many positions back they see, None for all."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    reach: int | None = None


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder with grouped-query attention and gated feed-forward, embeddings tied to the output."""

    width: int
    inner: int
    vocabulary: int
    attentions: tuple[Attention, ...]

    @classmethod
    def of(cls, config: Any) -> Decoder:
        """The sizes in a Gemma 3 text configuration of transformers."""
        sliding = config.layer_types.count("sliding_attention")
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        kinds = (
            Attention(sliding, *heads, reach=config.sliding_window),
            Attention(len(config.layer_types) - sliding, *heads),
        )
        return cls(config.hidden_size, config.intermediate_size, config.vocab_size, kinds)

    @property
    def layers(self) -> int:
        return sum(attention.layers for attention in self.attentions)


@dataclass(frozen=True)
class Topology:
    """``tensor`` ways to split heads for attention, times ``context`` ways to split the keys of each.

    Everything but attention is split over all ranks. Rank r is context rank r % context of tensor rank r // context.
    context 1 is tensor parallelism, 1 and 1 is one GPU.
    """

    tensor: int = 1
    context: int = 1

    @property
    def size(self) -> int:
        return self.tensor * self.context

    @property
    def name(self) -> str:
        if self.context > 1:
            return f"Helix {self.tensor}x{self.context}"
        return f"TP{self.tensor}" if self.tensor > 1 else "one GPU"

    @property
    def context_groups(self) -> range:
        """The first rank of every group that shares a sequence."""
        return range(0, self.size, self.context)

    def fits(self, decoder: Decoder) -> bool:
        """Whether heads can be shared. Keys' heads are repeated only where their sequence is not split."""
        return self.tensor >= 1 and self.context >= 1 and all(self._shares(kind) for kind in decoder.attentions)

    def _shares(self, kind: Attention) -> bool:
        split = kind.kv_heads % self.tensor == 0
        repeated = self.context == 1 and self.tensor % kind.kv_heads == 0
        return kind.heads % self.size == 0 and (split or repeated)


def topologies(decoder: Decoder, ranks: int) -> list[Topology]:
    """All topologies of exactly so many ranks that fit the decoder, tensor parallelism first."""
    splits = [Topology(ranks // context, context) for context in range(1, ranks + 1) if ranks % context == 0]
    return [topology for topology in splits if topology.fits(decoder)]


def check(topology: Topology, decoder: Decoder) -> None:
    """Raise ValueError, naming the topologies of as many ranks that fit, when this one does not."""
    if not topology.fits(decoder):
        kinds = {f"{kind.heads} query / {kind.kv_heads} key heads" for kind in decoder.attentions}
        others = ", ".join(other.name for other in topologies(decoder, topology.size)) or "another number of GPUs"
        raise ValueError(f"{topology.name} cannot share {' and '.join(sorted(kinds))}. Use {others}.")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in a topology, and the exchanges of its groups.

    everyone: all ranks; context: those that share this rank's sequences.
    """

    topology: Topology
    everyone: Exchange
    context: Exchange

    @property
    def tensor_rank(self) -> int:
        return self.everyone.rank // self.topology.context


ONE = Ranks(Topology(), Alone(), Alone())


def share(total: int, ranks: int, rank: int) -> slice:
    """A rank's run of ``total`` things, as even as can be."""
    return slice(rank * total // ranks, (rank + 1) * total // ranks)


@dataclass(frozen=True)
class Shares:
    """Which rows or columns of every weight of a layer a rank needs.

    query, key: rows of the projections to heads; output: columns of the one back; inner: rows of gate and up, columns of
    down.
    """

    query: slice
    key: slice
    output: slice
    inner: slice

    @classmethod
    def of(cls, decoder: Decoder, kind: Attention, topology: Topology, rank: int) -> Shares:
        tensor, tensor_rank = topology.tensor, rank // topology.context
        heads, size = kind.heads * kind.head_dim, topology.size
        # where there are fewer heads of keys than ranks, neighbours hold the same one
        groups = min(tensor, kind.kv_heads)
        return cls(
            query=share(heads, tensor, tensor_rank),
            key=share(kind.kv_heads * kind.head_dim, groups, tensor_rank * groups // tensor),
            output=share(heads, size, rank),
            inner=share(decoder.inner, size, rank),
        )
