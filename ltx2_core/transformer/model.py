"""The audio-video diffusion transformer of LTX-2 (2.0, 2.3, 2.5). Arithmetic: ltx-core 1.2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from ..av import AV
from ..config.transformer import StreamConfig, TransformerConfig
from .block import AVBlock
from .inputs import BlockKeep, Perturbation, StreamInput, plan_keeps
from .rope import Rotary, rotary_table
from .stream import Stream


class Transformer(nn.Module):
    """Predicts the velocity of video and audio tokens together."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        streams = config.streams
        self.video = Stream(config, streams.video, keyframe_marker=config.keyframe_marker)
        self.audio = Stream(config, streams.audio, keyframe_marker=False)
        self.blocks = nn.ModuleList(AVBlock(config) for _ in range(config.num_layers))

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
    ) -> AV[Tensor]:
        """Return the velocity [B, T, C] of each stream that is there.

        The four flags hold for every sample of the call (split passes); ``keeps`` from ``plan_keeps`` describes
        samples that differ (batched passes) and excludes the flags. ``on_block`` is called before every block and may
        raise to stop.
        """
        perturbation = Perturbation(
            tuple(skip_video_self_attn_blocks),
            tuple(skip_audio_self_attn_blocks),
            disable_a2v_cross_attn,
            disable_v2a_cross_attn,
        )
        if keeps is None:
            first = next(inputs.present()).latent
            keeps = plan_keeps([perturbation], self.config.num_layers, first.device, first.dtype)
        elif perturbation != Perturbation():
            raise ValueError("give either the flags of one pass or a plan of several passes, not both")

        conditioned = inputs.map(lambda own, stream, other: stream.condition(own, other), self.streams, inputs.swap())
        state = conditioned.map(lambda pair: pair[0])
        x = inputs.map(lambda own, stream: stream.embed(own), self.streams)
        for block, keep in zip(self.blocks, keeps, strict=True):
            if on_block is not None:
                on_block()
            x = block(x, state, keep)
        return x.map(lambda x, stream, own, pair: stream.predict(x, own, pair[1]), self.streams, inputs, conditioned)

    def project_contexts(self, features: AV[Tensor]) -> AV[Tensor]:
        """Text features of a prompt to the contexts that the streams attend to; once per prompt."""
        return features.map(lambda f, stream: stream.project_context(f), self.streams)

    def rotary_tables(self, positions: AV[Tensor]) -> AV[tuple[Rotary, Rotary]]:
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

        def tables(positions: Tensor, own: StreamConfig) -> tuple[Rotary, Rotary]:
            return (
                build(positions, dim=own.dim, heads=own.heads, max_pos=own.max_pos),
                build(positions[:, :1], dim=config.cross_dim, heads=own.heads, max_pos=(longest,)),
            )

        return positions.map(tables, config.streams)
