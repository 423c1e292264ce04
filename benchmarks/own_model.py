"""Our transformer with random weights, its evaluations as sampling runs them, and the ways in which it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine import kernels
from ltx2_engine.kernels.fp8 import pack_fp8
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning import state as tokens
from ltx2_engine.ltx2_core.conditioning.state import LatentState
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.numerics import NUMERICS, in_eight_bits
from ltx2_engine.ltx2_core.evaluate import EVALUATIONS
from ltx2_engine.ltx2_core.graphs import can_capture
from ltx2_engine.ltx2_core.loading.arena import Arena
from ltx2_engine.ltx2_core.loading.linear import PackedLinear, PackedWeight, put
from ltx2_engine.ltx2_core.networks import build_on_meta
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.transformer.model import Transformer
from random_model import STD
from shapes import TEXT_TOKENS
from torch import Tensor, nn

DTYPE = torch.bfloat16
SIGMA = 0.7
PLAIN = StreamGuidance()
NORMS = ("q_norm.weight", "k_norm.weight", "norm_q.weight", "norm_k.weight")

Output = list[Tensor]
Draw = Callable[..., Tensor]


def fill(model: nn.Module, device: torch.device, dtype: torch.dtype = DTYPE) -> Any:
    """Give a module without memory random weights, those of query and key norms and what divides latents around 1."""
    model = model.to(dtype).requires_grad_(False).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        near_one = name.endswith((*NORMS, "std-of-means", "latents_std"))
        tensor.normal_(float(near_one), STD, generator=generator)
    return model


def random_transformer(config: ModelConfig, device: torch.device) -> Transformer:
    """Weights lie as loading leaves them, every block's in one arena."""
    model = fill(build_on_meta("transformer", config), device)
    for block in model.blocks:
        Arena.of(block, device, pin=False)
    return model


def drawing(device: torch.device, dtype: torch.dtype = DTYPE) -> Draw:
    """A function from shapes to values N(0, 1) rounded to bfloat16, the same ones for the same shape."""

    def draw(*shape: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(1)
        return torch.randn(*shape, generator=generator, device=device, dtype=DTYPE).to(dtype)

    return draw


def text_widths(config: ModelConfig) -> AV[int]:
    """Of the text features that the transformer takes."""
    transformer = config.transformer
    return transformer.streams.map(lambda own: transformer.caption_channels or own.context_dim)


def random_states(config: ModelConfig, clip: ClipShape, draw: Draw) -> AV[LatentState]:
    video, audio = config.video_vae, config.audio_vae
    return AV(
        tokens.video_state(draw(1, video.latent_channels, *clip.grid), clip),
        tokens.audio_state(draw(1, audio.latent_channels, clip.audio_latents, audio.latent_mel_bins)),
    )


def random_prompt(config: ModelConfig, draw: Draw) -> AV[Tensor]:
    return text_widths(config).map(lambda width: draw(1, TEXT_TOKENS, width))


def step_of(
    config: ModelConfig,
    model: Transformer,
    clip: ClipShape,
    draw: Draw,
    guidance: StreamGuidance = PLAIN,
    evaluation: str = "split",
    *,
    graphed: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Callable[[], Output]:
    """One evaluation of all passes of a step, as the samplers call it; gives every velocity.

    graphed: captured at its first call, as the engine does it where a device can. check: may raise to stop.
    """
    states, prompt = random_states(config, clip, draw), random_prompt(config, draw)
    x = states.map(lambda state: state.latent)
    passes = plan_passes(AV(guidance, guidance))
    graphed = graphed and can_capture(next(x.present()).device)
    both = prompt, prompt.map(torch.neg)
    evaluate = EVALUATIONS[evaluation](model, states, passes, *both, check, graphed=graphed)
    return lambda: [part for velocity in evaluate(x, SIGMA, AV(True, True)) for part in velocity.present()]


def numerics() -> dict[str, Callable[[Transformer], None]]:
    """The transformer's numerics by name, each with what puts a model into it; the last one changes its weights for good."""
    modes: dict[str, Callable[[Transformer], None]] = {
        name: partial(Transformer.use_numerics, name=name) for name in NUMERICS
    }
    return modes | {"fp8": to_eight_bits}


def to_eight_bits(model: Transformer) -> None:
    """What loading makes of a model whose numerics are fp8."""
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and in_eight_bits(f"{name}.weight"):
            weight = linear.weight
            data, scale = pack_fp8(weight, weight.new_empty(len(weight), 1, dtype=torch.float32))
            packed = PackedWeight("fp8", weight.shape, {"data": data, "scale": scale})
            put(model, name, PackedLinear(None, packed, linear.bias, eight_bit=True))
    for block in model.blocks:
        # without the old weights, in whose memory the other tensors still lie
        Arena.of(block, next(block.parameters()).device, pin=False)
    model.use_numerics("fp8")


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Inside the block, every operation runs its definition in torch, as with LTX2_KERNELS=torch."""
    dispatch = getattr(kernels, "dispatch", None)
    operations = [] if dispatch is None else list(dispatch.OPERATIONS.values())
    for operation in operations:
        operation.switch_off("benchmark of plain torch")
    try:
        yield
    finally:
        for operation in operations:
            operation.reset()
