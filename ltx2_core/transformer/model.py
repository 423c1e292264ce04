"""The audio-video diffusion transformer of LTX-2 (2.0, 2.3, 2.5). Arithmetic: ltx-core 1.2."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..av import AV
from ..config.numerics import NUMERICS
from ..config.transformer import StreamConfig, TransformerConfig
from .block import BOTH_ALONE, AVBlock, Common, Once, StreamState, Texts
from .inputs import BlockKeep, Pass, Perturbation, StreamInput, besides_text, plan_keeps
from .lanes import ONE_LANE, Lanes
from .rope import CrossRotary, Rotary, rotary_table
from .stream import Stream

T = TypeVar("T")
# enough for a kernel to show whether it is right
_FEW = 64
_CONTAINERS = (dict, set)


@dataclass(frozen=True)
class _Walk:
    """A pass on its way through the blocks; nothing of it is changed in place, so passes may share it."""

    x: AV[Tensor]
    state: AV[StreamState]
    embedded: AV[Tensor]

    def reading(self, inputs: AV[StreamInput]) -> _Walk:
        """The same at its beginning, with the prompt of these inputs."""
        return replace(self, state=self.state.map(lambda state, own: replace(state, inputs=own), inputs))


class Transformer(nn.Module):
    """Predicts the velocity of video and audio tokens together."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        streams = config.streams
        self.video = Stream(config, streams.video, keyframe_marker=config.keyframe_marker)
        self.audio = Stream(config, streams.audio, keyframe_marker=False)
        self.blocks = nn.ModuleList(_alike(partial(AVBlock, config), config.num_layers))

    def use_numerics(self, name: str) -> None:
        """Compute as ``config.numerics`` says from now on. Which layers compute in eight bits is for their weights to say."""
        if name not in NUMERICS:
            raise ValueError(f"numerics {name!r} is not known; choose {', '.join(NUMERICS)}")
        for module in self.modules():
            if "fast" in vars(module):
                vars(module)["fast"] = name != "exact"

    @property
    def streams(self) -> AV[Stream]:
        return AV(self.video, self.audio)

    def forward(
        self,
        inputs: AV[StreamInput],
        *,
        skip_video_self_attn_blocks: Sequence[int] = (),
        skip_audio_self_attn_blocks: Sequence[int] = (),
        disable_a2v_cross_attn: bool = False,
        disable_v2a_cross_attn: bool = False,
        keeps: Sequence[BlockKeep] | None = None,
        on_block: Callable[[], None] | None = None,
        lanes: Lanes = ONE_LANE,
    ) -> AV[Tensor]:
        """Return the velocity [B, T, C] of each stream that is there, of all tokens also where inputs are a rank's share.

        The four flags hold for every sample of the call (split passes); ``keeps`` from ``plan_keeps`` describes
        samples that differ (batched passes) and excludes the flags. ``on_block`` is called before every block and may
        raise to stop. ``lanes``: where the streams compute inside the blocks.
        """
        perturbation = Perturbation(
            tuple(skip_video_self_attn_blocks),
            tuple(skip_audio_self_attn_blocks),
            disable_a2v_cross_attn,
            disable_v2a_cross_attn,
        )
        if keeps is None:
            return self.run_passes([Pass(inputs, perturbation)], on_block=on_block, lanes=lanes)[0]
        if perturbation != Perturbation():
            raise ValueError("give either the flags of one pass or a plan of several passes, not both")
        walk = self._begin(inputs)
        lanes.part()
        for block, keep in zip(self.blocks, keeps, strict=True):
            walk = self._step(block, walk, keep, {}, on_block, lanes)
        lanes.join()
        return self._finish(walk)

    def run_passes(
        self,
        passes: Sequence[Pass],
        *,
        share_prefixes: bool = True,
        on_block: Callable[[], None] | None = None,
        lanes: Lanes = ONE_LANE,
    ) -> list[AV[Tensor]]:
        """Evaluate several passes block after block; returns the velocity of each.

        A pass's flags are plain Python, so a skipped attention is not computed. Passes with the same inputs are one
        until the first block in which they differ, and passes whose inputs differ in the prompt until they read it: that
        changes no bit, and four guidance passes cost about 3.3. ``on_block`` is called before every block that is computed.
        """
        keeps = [plan_keeps([one.perturbation], self.config.num_layers, *_kind(one.inputs)) for one in passes]
        walks = self._begin_all([one.inputs for one in passes], share_prefixes)
        lanes.part()
        for number, block in enumerate(self.blocks):
            texts: Texts = {}
            walks = [
                (members, self._step(block, walk, keep, texts, on_block, lanes, common))
                for members, walk, keep, common in _calls(walks, [plan[number] for plan in keeps])
            ]
        lanes.join()
        results = {index: self._finish(walk) for members, walk in walks for index in members}
        return [results[index] for index in range(len(passes))]

    def warm_up(self, inputs: AV[StreamInput], keeps: Sequence[BlockKeep]) -> None:
        """Run the first block on a few tokens in every way that ``keeps`` (from ``plan_keeps``) tells of.

        Fused kernels are compiled and checked then, so that no evaluation waits for it.
        """
        few = inputs.map(lambda one: one.first(_FEW))
        for keep in dict.fromkeys(keeps):
            self._finish(self._step(self.blocks[0], self._begin(few), keep, {}, None))

    def _begin(self, inputs: AV[StreamInput]) -> _Walk:
        conditioned = inputs.map(lambda own, stream, other: stream.condition(own, other), self.streams, inputs.swap())
        return _Walk(
            x=inputs.map(lambda own, stream: stream.embed(own), self.streams),
            state=conditioned.map(lambda pair: pair[0]),
            embedded=conditioned.map(lambda pair: pair[1]),
        )

    def _begin_all(self, inputs: Sequence[AV[StreamInput]], share_prefixes: bool) -> list[tuple[list[int], _Walk]]:
        """The passes that have these inputs at their beginning: which of them are one, and how."""
        if not share_prefixes:
            return [([index], self._begin(one)) for index, one in enumerate(inputs)]
        walks = []
        for alike in _by_key(range(len(inputs)), lambda index: besides_text(inputs[index])):
            first = self._begin(inputs[alike[0]])
            same = _by_key(alike, lambda index: id(inputs[index]))
            walks += [(members, first.reading(inputs[members[0]])) for members in same]
        return walks

    @staticmethod
    def _step(
        block: nn.Module,
        walk: _Walk,
        keep: BlockKeep,
        texts: Texts,
        on_block: Callable[[], None] | None,
        lanes: Lanes = ONE_LANE,
        common: AV[Common] = BOTH_ALONE,
    ) -> _Walk:
        if on_block is not None:
            on_block()
        if block._compiled_call_impl is not None:
            # compiled as one piece: anything else would be compiled again, in the middle of a capture
            lanes, common = ONE_LANE, BOTH_ALONE
        return replace(walk, x=block(walk.x, walk.state, keep, texts, lanes, common))

    def _finish(self, walk: _Walk) -> AV[Tensor]:
        return walk.x.map(
            lambda x, stream, state, embedded: state.inputs.split.gather(stream.predict(x, state.inputs, embedded)),
            self.streams,
            walk.state,
            walk.embedded,
        )

    def project_contexts(self, features: AV[Tensor]) -> AV[Tensor]:
        """Text features of a prompt to the contexts that the streams attend to; once per prompt."""
        return features.map(lambda f, stream: stream.project_context(f), self.streams)

    def rotary_tables(self, positions: AV[Tensor]) -> AV[tuple[Rotary, CrossRotary]]:
        """Tables of self attention and of audio-video attention for tokens at these positions.

        positions: [B, 3, T, 2] (seconds, px, px) and [B, 1, T, 2] (seconds), float32 bounds.
        """
        config = self.config
        longest = max(config.streams.video.max_pos[0], config.streams.audio.max_pos[0])
        build = partial(
            rotary_table,
            theta=config.rope_theta,
            double_precision=config.rope_double_precision,
            dtype=self.video.patchify_proj.weight.dtype,
        )

        def tables(positions: Tensor, own: StreamConfig) -> tuple[Rotary, CrossRotary]:
            return (
                build(positions, dim=own.dim, heads=own.heads, max_pos=own.max_pos),
                CrossRotary.whole(build(positions[:, :1], dim=config.cross_dim, heads=own.heads, max_pos=(longest,))),
            )

        return positions.map(tables, config.streams)


def _alike(make: Callable[[], nn.Module], count: int) -> Iterator[nn.Module]:
    """So many modules that are made alike. Without memory for weights one is made, and the others are copies of its shell,
    which takes a quarter of the time."""
    first = make()
    yield first
    without_memory = all(parameter.is_meta for parameter in first.parameters())
    for _ in range(count - 1):
        if without_memory:
            # whoever builds without memory has every operation handled by Python, a copy's thousands of them too
            with torch._C.DisableTorchFunction():
                copy = _shell_copy(first)
            yield copy
        else:
            yield make()


def _shell_copy(module: nn.Module) -> nn.Module:
    """A module like this one with parameters of its own that have no memory; plain attributes are shared."""
    copy = object.__new__(type(module))
    copy.__dict__ = {
        key: value.copy() if isinstance(value, _CONTAINERS) else value for key, value in module.__dict__.items()
    }
    for name, parameter in module._parameters.items():
        copy._parameters[name] = None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else _shell_copy(child)
    return copy


def _kind(inputs: AV[StreamInput]) -> tuple[torch.device, torch.dtype]:
    first = next(inputs.present()).latent
    return first.device, first.dtype


def _calls(
    walks: Iterable[tuple[list[int], _Walk]], keeps: Sequence[BlockKeep]
) -> Iterator[tuple[list[int], _Walk, BlockKeep, AV[Common]]]:
    """What one block has to compute: for which passes, from where, which attentions, and what it has in common with others.

    keeps: of every pass.
    """
    parts = [(part, walk, keeps[part[0]]) for members, walk in walks for part in _by_key(members, keeps.__getitem__)]
    for alike in _by_key(parts, lambda part: (id(part[1].x), part[2].self_attn)):
        own = _once_for(alike)
        for readers in _by_key(alike, lambda part: id(part[1])):
            text = _once_for(readers)
            for part in readers:
                yield *part, AV(Common(own.video, text.video), Common(own.audio, text.audio))


def _once_for(sharers: Sequence[object]) -> AV[Once | None]:
    """For each stream what these make once; nothing for one alone."""
    count = len(sharers)
    return AV(Once(count), Once(count)) if count > 1 else AV()


def _by_key(members: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Members with equal keys together, in order of first appearance."""
    groups: dict[Hashable, list[T]] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return list(groups.values())
