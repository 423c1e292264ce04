"""The whole transformer on fused kernels against the same in plain torch, for every kind of pass."""

from dataclasses import replace

import pytest
import torch
from ltx2_engine.kernels import dispatch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning import state as tokens
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.config.transformer import TransformerConfig
from ltx2_engine.ltx2_core.evaluate import EVALUATIONS
from ltx2_engine.ltx2_core.loading.arena import Arena
from ltx2_engine.ltx2_core.sampling.choice import SamplerChoice
from ltx2_engine.ltx2_core.sampling.denoise import Denoiser
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.sampling.noise import SamplerNoise
from ltx2_engine.ltx2_core.sampling.samplers import SAMPLERS
from ltx2_engine.ltx2_core.sampling.warm_up import warm_up
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.transformer.model import Transformer

CHANNELS = 8
GUIDED = StreamGuidance(cfg=3.0, stg=1.0, modality=3.0, stg_blocks=(0,), rescale=0.7)
PLAIN = StreamGuidance()
USED = {"residual_norm_modulate", "qk_norm_rotary", "norm_rotary", "rms_norm", "guidance_combine"}


def small_model(label, device, numerics="exact"):
    config = TransformerConfig.from_config(released_config(label))

    def small(stream, head_dim):
        sizes = {"heads": 2, "head_dim": head_dim, "context_dim": 2 * head_dim}
        return replace(stream, **sizes, in_channels=CHANNELS, out_channels=CHANNELS)

    streams = config.streams.map(small, AV(32, 16))
    caption = None if config.caption_channels is None else streams.video.context_dim
    model = Transformer(replace(config, streams=streams, num_layers=1, caption_channels=caption))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05 + mean).to(device, torch.bfloat16)
    model.requires_grad_(False).use_numerics(numerics)
    for block in model.blocks:
        Arena.of(block, device, pin=False)
    return model


def sampled(model, device, guidance, mode, kept):
    """An Euler step, with a hook that is called when everything has been warmed up."""
    config, generator = model.config, torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    clip = ClipShape(1, 64, 64, 24.0)
    video = tokens.video_state(randn(1, CHANNELS, *clip.grid), clip)
    if kept:
        video = video.write(randn(1, 1, CHANNELS), 0, 0.75)
    states = AV(video, tokens.audio_state(randn(1, CHANNELS, clip.audio_latents, 1)))
    widths = config.streams.map(lambda stream: config.caption_channels or stream.context_dim)
    positive, negative = (widths.map(lambda width: randn(1, 7, width)) for _ in range(2))
    both = AV(guidance, guidance)
    passes = plan_passes(both)
    with torch.inference_mode():
        evaluate = EVALUATIONS[mode](model, states, passes, positive, negative, lambda: None)
        warm_up(states, passes, both, "euler")
        checked = {name: set(one._proved) for name, one in dispatch.OPERATIONS.items()}
        denoise = Denoiser(evaluate, states, passes, both)
        noise = SamplerNoise(SamplerChoice("euler"), 0, device)
        x = states.map(lambda state: randn(*state.latent.shape))
        x = SAMPLERS["euler"](denoise, x, (1.0, 0.6), noise, SamplerChoice("euler"), lambda *_: None)
    if dispatch.runs_fused(device):
        assert checked == {name: set(one._proved) for name, one in dispatch.OPERATIONS.items()}, "a step had to check"
    return x


def in_plain_torch(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "refusal", lambda device: "not here")
        return run()


def apart(x, y):
    """Relative difference of both streams."""
    return max(
        float((a.float() - b.float()).norm() / a.float().norm()) for a, b in zip(x.present(), y.present(), strict=True)
    )


@pytest.mark.parametrize(
    ("label", "guidance", "mode", "kept"),
    [
        ("2.0", PLAIN, "split", True),
        ("2.0", GUIDED, "batched", False),
        ("2.3", PLAIN, "split", False),
        ("2.3", GUIDED, "split", True),
        ("2.3", GUIDED, "batched", True),
    ],
)
def test_sampling_with_fused_kernels(device, monkeypatch, label, guidance, mode, kept):
    model = small_model(label, device)

    def run():
        return sampled(model, device, guidance, mode, kept)

    want = in_plain_torch(monkeypatch, run)
    for operation in dispatch.OPERATIONS.values():
        operation.reset()
    got = run()
    counts = {name: count for name, count in dispatch.statistics().items() if count}
    assert counts.keys() == USED | ({"head_gate"} if label == "2.3" else set())
    assert {reason for count in counts.values() for reason in count} == {"triton"}, counts
    print(f"{label}: {apart(want, got):.1e} apart")
    # a sum in another order moves single values by one unit; the second bound is what that grows to
    assert apart(want, got) < 2.5e-3


def test_fewer_roundings_err_no_more(device, monkeypatch):
    """Fused and in plain torch, against float32."""
    models = {name: small_model("2.3", device, name) for name in ("exact", "fast")}

    def forward(model):
        with torch.inference_mode():
            return evaluate_once(model, device)

    got = {name: forward(model) for name, model in models.items()}
    plain = in_plain_torch(monkeypatch, lambda: forward(models["fast"]))
    truth = forward(small_model("2.3", device).float())
    errors = {name: apart(truth, x) for name, x in (*got.items(), ("fast, plain torch", plain))}
    print(errors)
    assert apart(got["exact"], got["fast"]) > 0, "it made no difference"
    assert apart(plain, got["fast"]) < 2e-3
    assert errors["fast"] < 1.2 * errors["exact"]


def evaluate_once(model, device):
    generator = torch.Generator().manual_seed(1)
    dtype = model.video.patchify_proj.weight.dtype

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(device, dtype)

    clip = ClipShape(1, 96, 96, 24.0)
    states = AV(
        tokens.video_state(randn(1, CHANNELS, *clip.grid), clip),
        tokens.audio_state(randn(1, CHANNELS, clip.audio_latents, 1)),
    )
    widths = model.config.streams.map(lambda stream: stream.context_dim)
    passes = plan_passes(AV(StreamGuidance(), StreamGuidance()))
    evaluate = EVALUATIONS["split"](
        model, states, passes, widths.map(lambda width: randn(1, 7, width)), None, lambda: None
    )
    return evaluate(states.map(lambda state: state.latent), 0.7, AV(True, True))[0]
