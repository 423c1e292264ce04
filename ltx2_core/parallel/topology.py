"""How ranks share the guidance passes of a stage: the cheapest division by a model of what a step costs.

Rates and times are those of an H200 in bfloat16; what counts is how they compare, and the link's speed is measured. One pass
belongs to all ranks; several are divided as the formula says, and where that gains less than 5 % they stay in one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config.transformer import TransformerConfig
from ..sampling.guidance import GuidancePass
from .groups import Topology

# operations a second: matrix products, attention of the picture to itself, attention to text
_LINEAR, _SELF_ATTENTION, _TEXT_ATTENTION = 665e12, 640e12, 630e12
# seconds of a block for the sound, which every rank computes alike, and, for a token of 4096 values, between the products
_SOUND_SECONDS = 0.35e-3
_ELEMENTWISE_SECONDS = 2.1e-3 / 24576
_ELEMENTWISE_WIDTH = 4096
# seconds before the first byte of an exchange arrives: of queries, keys and values in one, of one tensor, of sound
_PACKED_START, _SINGLE_START, _SOUND_START = 40e-6, 22e-6, 28e-6
# bytes a second between ranks of one H200 host, for a fleet that has not measured its own
LINK_SPEED = 320e9
_BYTES = 2
# one group shares more than the formula counts: memory, and what is streamed
_WORTH_SPLITTING = 1.05


@dataclass(frozen=True)
class StageWork:
    """What one stage evaluates. tokens: of the picture, conditions included. text: tokens of a prompt."""

    tokens: int
    text: int
    config: TransformerConfig
    link_speed: float = LINK_SPEED

    def pass_seconds(self, ulysses: int) -> float:
        """Of one conditional pass on so many ranks."""
        own = self._per_rank(ulysses)
        return self.config.num_layers * (
            own + _SOUND_SECONDS + self._text_operations() / _LINEAR + self._exchange(ulysses)
        )

    def isolated_share(self) -> float:
        """What a pass without audio-video attention costs of a whole one."""
        cross = self.tokens * self._cross_parameters() * 2
        return 1 - cross / (self.tokens * self._token_operations() + self._attention() + self._text_operations())

    def _per_rank(self, ulysses: int) -> float:
        width = self.config.streams.video.dim
        text = 4 * self.tokens * self.text * width
        between = self.tokens * _ELEMENTWISE_SECONDS * width / _ELEMENTWISE_WIDTH
        linear = self.tokens * self._token_operations() / _LINEAR
        return (linear + self._attention() / _SELF_ATTENTION + text / _TEXT_ATTENTION + between) / ulysses

    def _token_operations(self) -> float:
        """Of the linear layers of a block: self attention, queries and result of text attention, feed-forward, cross."""
        return 2 * (14 * self.config.streams.video.dim**2 + self._cross_parameters())

    def _cross_parameters(self) -> float:
        return 4 * self.config.streams.video.dim * self.config.cross_dim

    def _attention(self) -> float:
        return 4 * self.tokens**2 * self.config.streams.video.dim

    def _text_operations(self) -> float:
        return 4 * self.config.streams.video.dim**2 * self.text

    def _exchange(self, ulysses: int) -> float:
        """Seconds of a block's exchanges; none is hidden behind other work."""
        if ulysses == 1:
            return 0.0
        share = math.ceil(self.tokens / ulysses) * self.config.streams.video.dim * _BYTES
        sent = share * (ulysses - 1) / ulysses
        return _PACKED_START + 3 * sent / self.link_speed + _SINGLE_START + sent / self.link_speed + _SOUND_START


def pass_weights(passes: Sequence[GuidancePass], num_layers: int, isolated_share: float) -> float:
    """What the passes of one group cost together, in conditional passes: they are one as long as they are equal."""
    total = 0.0
    seen: list[GuidancePass] = []
    for one in passes:
        shared = max((_alike_blocks(one, other, num_layers) for other in seen), default=0)
        skips_cross = one.disable_a2v_cross_attn and one.disable_v2a_cross_attn
        total += (num_layers - shared) / num_layers * (isolated_share if skips_cross else 1.0)
        seen.append(one)
    return total


def _alike_blocks(one: GuidancePass, other: GuidancePass, num_layers: int) -> int:
    """How many first blocks two passes have in common."""

    def prompt_and_links(p: GuidancePass) -> tuple[bool, bool, bool]:
        return p.negative, p.disable_a2v_cross_attn, p.disable_v2a_cross_attn

    if prompt_and_links(one) != prompt_and_links(other):
        return 0
    return min(
        set(one.skip_video_self_attn_blocks) ^ set(other.skip_video_self_attn_blocks)
        | (set(one.skip_audio_self_attn_blocks) ^ set(other.skip_audio_self_attn_blocks)),
        default=num_layers,
    )


@dataclass(frozen=True)
class Choice:
    """A topology, and why it was taken."""

    topology: Topology
    reason: str


def choose_topology(
    work: StageWork, passes: Sequence[GuidancePass], ranks: int, wanted: str = "auto", *, share_prefixes: bool = True
) -> Choice:
    """How ``ranks`` ranks evaluate these passes. wanted: "auto", or "groups x ranks of a group" as the user chose it."""
    whole = Topology(1, ranks)
    if len(passes) == 1:
        return Choice(whole, "one pass belongs to all ranks")
    if wanted != "auto":
        groups, ulysses = map(int, wanted.split("x"))
        return Choice(Topology(groups, ulysses), "chosen by the user")
    costs = step_seconds(work, passes, ranks, share_prefixes=share_prefixes)
    best = min(costs, key=lambda topology: costs[topology])
    chosen = whole if costs[whole] <= _WORTH_SPLITTING * costs[best] else best
    listed = ", ".join(f"{name(topology)} {seconds * 1000:.1f} ms" for topology, seconds in costs.items())
    return Choice(chosen, f"a step of {len(passes)} passes over {work.tokens:,} tokens by the formula: {listed}")


def step_seconds(
    work: StageWork, passes: Sequence[GuidancePass], ranks: int, *, share_prefixes: bool = True
) -> dict[Topology, float]:
    """What a step costs with every topology: that of the group with most to do."""
    heads = work.config.streams.video.heads
    layers, isolated = work.config.num_layers, work.isolated_share()
    weigh: Callable[[Sequence[GuidancePass]], float] = (
        (lambda own: pass_weights(own, layers, isolated)) if share_prefixes else len
    )
    costs = {}
    for groups in (count for count in range(1, ranks + 1) if ranks % count == 0 and heads % (ranks // count) == 0):
        shares = [passes[own::groups] for own in range(groups)]
        costs[Topology(groups, ranks // groups)] = work.pass_seconds(ranks // groups) * max(map(weigh, shares))
    return costs


def name(topology: Topology) -> str:
    return f"{topology.groups}x{topology.ulysses}"
