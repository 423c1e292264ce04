"""Bytes that every rank reads and sends for one more token: what a topology is chosen by.

Generation of a few sequences is bound by what is read from memory. This counts bytes and nothing else: neither the time
of small exchanges nor of launches, so it orders topologies and promises no speed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..presets import ENHANCE_TOPOLOGIES as CHOICES
from .helix_topology import Attention, Decoder, Topology, check, topologies


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank, for the next token of each sequence of a batch: weights and keys read, and bytes sent."""

    weights: int
    cache: int
    sent: int

    @property
    def read(self) -> int:
        return self.weights + self.cache


def traffic(
    decoder: Decoder, topology: Topology, length: int, *, batch: int = 1, weight_bytes: int = 2, cache_bytes: int = 2
) -> Traffic:
    """What one rank reads and sends, with the feed-forward split by weights; norms are left out.

    length: positions that the sequences have; weight_bytes, cache_bytes: of one value.

    Raises ValueError when the topology does not fit the decoder.
    """
    check(topology, decoder)
    shared = 3 * decoder.layers * decoder.width * decoder.inner + decoder.vocabulary * decoder.width
    weights = shared // topology.size + sum(_weights(decoder, kind, topology) for kind in decoder.attentions)
    cache = sum(_cache(kind, topology, length) for kind in decoder.attentions)
    return Traffic(weights * weight_bytes, batch * cache * cache_bytes, batch * _sent(decoder, topology, cache_bytes))


def choose(decoder: Decoder, ranks: int, length: int, *, batch: int = 1, choice: str = "auto") -> Topology:
    """The topology on at most so many ranks of which each reads the fewest bytes; at equality, sends the fewest.

    choice: auto, or single, tensor or helix, which leave only those. Raises ValueError when none is left.
    """
    if choice not in CHOICES:
        raise ValueError(f"topology {choice!r} is not known; choose {', '.join(CHOICES)}")
    allowed = [t for size in range(1, ranks + 1) for t in topologies(decoder, size) if choice in ("auto", kind_of(t))]
    if not allowed:
        raise ValueError(f"no topology of kind {choice} fits this model on {ranks} GPUs; choose auto or single")

    def cost(topology: Topology) -> tuple[int, int]:
        bytes_ = traffic(decoder, topology, length, batch=batch)
        return bytes_.read, bytes_.sent

    return min(allowed, key=cost)


def kind_of(topology: Topology) -> str:
    """The name that chooses topologies like this one."""
    return "helix" if topology.context > 1 else "tensor" if topology.tensor > 1 else "single"


def describe(decoder: Decoder, topology: Topology, length: int) -> str:
    """One line for the log: what a topology reads a token, beside one GPU."""

    def read(topology: Topology) -> str:
        count = traffic(decoder, topology, length)
        return f"{count.weights / 1e9:.2f} GB of weights and {count.cache / 1e9:.2f} GB of keys"

    return f"{topology.name} at {length:,} positions: {read(topology)} a token and GPU; one GPU: {read(Topology())}"


def table(decoder: Decoder, shown: list[Topology], lengths: list[int]) -> str:
    """Gigabytes a token in Markdown: a row for every topology and length."""
    lines = ["| topology | positions | weights read | keys read | sent |", "|---|--:|--:|--:|--:|"]
    for length in lengths:
        for topology in shown:
            count = traffic(decoder, topology, length)
            cells = (f"{value / 1e9:.2f}" for value in (count.weights, count.cache))
            lines.append(f"| {topology.name} | {length:,} | {' GB | '.join(cells)} GB | {count.sent / 1e6:.2f} MB |")
    return "\n".join(lines)


def _kv_heads(kind: Attention, topology: Topology) -> int:
    return max(kind.kv_heads // topology.tensor, 1)


def _weights(decoder: Decoder, kind: Attention, topology: Topology) -> int:
    """Values of the projections of one kind's layers that a rank reads."""
    inputs = kind.heads // topology.tensor + 2 * _kv_heads(kind, topology)
    return kind.layers * decoder.width * kind.head_dim * (inputs + kind.heads // topology.size)


def _cache(kind: Attention, topology: Topology, length: int) -> int:
    """Values of keys and values that a rank reads, rounded up to whole positions."""
    seen = length if kind.reach is None else min(length, kind.reach)
    return kind.layers * 2 * _kv_heads(kind, topology) * kind.head_dim * -(-seen // topology.context)


def _sent(decoder: Decoder, topology: Topology, value_bytes: int) -> int:
    """Bytes for one token: two sums over all ranks and an exchange of heads a layer, and the scores of the vocabulary."""
    others, context = topology.size - 1, topology.context
    sums = 2 * decoder.layers * 2 * decoder.width * value_bytes * others // topology.size
    heads = sum(
        kind.layers * kind.heads // topology.tensor * (kind.head_dim * value_bytes + 4) * (context - 1) // context
        for kind in decoder.attentions
    )
    return sums + heads + decoder.vocabulary // topology.size * value_bytes * others
