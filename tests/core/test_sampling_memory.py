"""The estimate of sampling's memory against the tensors that really live, operation by operation.

On the CPU whole runs of a small model are watched; on the meta device the full-size transformer, whose operations take no
time there. Both make the tensors that a GPU makes, but for two layouts that ``on_gpu`` imitates.
"""

from dataclasses import replace

import pytest
import torch
from ltx2_engine import kernels
from ltx2_engine.kernels import dispatch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning import state as tokens
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.config.transformer import TransformerConfig
from ltx2_engine.ltx2_core.evaluate import EVALUATIONS
from ltx2_engine.ltx2_core.loading.arena import Arena
from ltx2_engine.ltx2_core.parallel.context import SINGLE, ParallelContext
from ltx2_engine.ltx2_core.sampling.choice import SamplerChoice
from ltx2_engine.ltx2_core.sampling.denoise import Denoiser
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.sampling.noise import SamplerNoise
from ltx2_engine.ltx2_core.sampling.samplers import SAMPLERS
from ltx2_engine.ltx2_core.sampling_memory import sampling_work_bytes
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.testing import LiveBytes
from ltx2_engine.ltx2_core.transformer import attention, heads
from ltx2_engine.ltx2_core.transformer.inputs import Pass, Perturbation, StreamInput, Timesteps
from ltx2_engine.ltx2_core.transformer.model import Transformer

TOLERANCE = 0.03
CHANNELS = 8
GUIDANCE = {
    1: StreamGuidance(),
    2: StreamGuidance(cfg=3.0),
    4: StreamGuidance(cfg=3.0, stg=1.0, modality=3.0, stg_blocks=(0,)),
}


def compare(name, predicted, measured, tolerance=TOLERANCE):
    print(
        f"{name}: predicted {predicted / 1e6:.2f} MB, measured {measured / 1e6:.2f} MB, {predicted / measured - 1:+.2%}"
    )
    assert abs(predicted / measured - 1) <= tolerance


# whole runs of a small model on the CPU -------------------------------------------------------------------------------


def small_config(label, dtype, heads=2):
    config = TransformerConfig.from_config(released_config(label))

    def small(stream, head_dim):
        sizes = {"heads": heads, "head_dim": head_dim, "context_dim": heads * head_dim}
        return replace(stream, **sizes, in_channels=CHANNELS, out_channels=CHANNELS)

    # wide enough that a block's arena leaves no gaps between weights
    streams = config.streams.map(small, AV(256 // dtype.itemsize, 128 // dtype.itemsize))
    caption = None if config.caption_channels is None else streams.video.context_dim
    return replace(config, streams=streams, num_layers=2, caption_channels=caption)


def small_model(label, dtype, heads=2):
    torch.manual_seed(0)
    model = Transformer(small_config(label, dtype, heads)).requires_grad_(False).to(dtype)
    for parameter in model.parameters():
        parameter.data = (torch.randn(parameter.shape) * 0.05).to(dtype)
    for block in model.blocks:
        # as loading does it
        Arena.of(block, pin=False)
    return model


def run(model, clip, *, passes=1, mode="split", sampler="euler", batch=1, kept=False, biased=False, text=64, ulysses=1):
    """The peak of a run of two steps, on one of so many ranks that share the video, and its prediction."""
    config = model.config
    dtype = model.video.patchify_proj.weight.dtype
    widths = config.streams.map(lambda stream: config.caption_channels or stream.context_dim)
    guidance = AV(GUIDANCE[passes], GUIDANCE[passes])
    planned = plan_passes(guidance)
    with torch.inference_mode(), LiveBytes() as live:
        video = tokens.video_state(torch.zeros(batch, CHANNELS, *clip.grid, dtype=dtype), clip)
        if kept:
            video = video.write(torch.ones(1, 4, CHANNELS, dtype=dtype), 0, 1.0)
        if biased:
            video = replace(video, attention_mask=torch.rand(batch, video.num_target, video.num_target).to(dtype))
        states = AV(video, tokens.audio_state(torch.zeros(batch, CHANNELS, clip.audio_latents, 1, dtype=dtype)))
        del video
        prompts = [widths.map(lambda width: torch.randn(1, text, width).to(dtype)) for _ in range(min(passes, 2))]
        parallel = SINGLE if ulysses == 1 else ParallelContext(0, ulysses, Alike(ulysses))
        evaluate = EVALUATIONS[mode](
            model, states, planned, prompts[0], (*prompts, None)[1], lambda: None, parallel=parallel
        )
        x = states.map(lambda state: torch.randn_like(state.latent))
        live.peak = 0
        choice = SamplerChoice(sampler)
        noise = SamplerNoise(choice, 0, torch.device("cpu"))
        denoise = Denoiser(evaluate, states, planned, guidance)
        SAMPLERS[sampler](denoise, x, (1.0, 0.7, 0.4), noise, choice, lambda *_: None)
    predicted = sampling_work_bytes(
        config,
        AV(clip.num_video_tokens, clip.audio_latents),
        text,
        batch=batch,
        passes=passes,
        mode=mode,
        dtype=dtype,
        levels=AV(2 if kept else 1, 1),
        biased=AV(biased, False),
        sampler=sampler,
        ulysses=ulysses,
    )
    return predicted.allocated, live.peak


class Alike:
    """Collectives among ranks that all send the same."""

    def __init__(self, size):
        self.size = size

    def all_to_all(self, x):
        return x.clone()

    def all_gather(self, x):
        return x.expand(self.size, *x.shape).clone()


@pytest.mark.parametrize("label", ["2.0", "2.3"])
@pytest.mark.parametrize("passes", [1, 2, 4])
@pytest.mark.parametrize("mode", ["split", "batched"])
@pytest.mark.parametrize("kept", [False, True], ids=["one level", "two levels"])
@pytest.mark.parametrize("clip", [ClipShape(25, 256, 384, 24.0), ClipShape(9, 64, 64, 24.0)], ids=["clip", "tiny clip"])
def test_the_peak_of_a_run(label, passes, mode, kept, clip):
    predicted, measured = run(small_model(label, torch.float32), clip, passes=passes, mode=mode, kept=kept)
    compare(f"{label}, {passes} {mode}", predicted, measured)


@pytest.mark.parametrize("mode", ["split", "batched"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sampler", ["euler", "res_2s", "gradient_estimation", "euler_ancestral"])
def test_the_peak_with_other_samplers_and_samples(mode, batch, sampler):
    model = small_model("2.3", torch.bfloat16)
    clip = ClipShape(25, 256, 384, 24.0)
    predicted, measured = run(model, clip, passes=4, mode=mode, sampler=sampler, batch=batch)
    compare(f"{sampler}, {batch} samples, {mode}", predicted, measured)


@pytest.mark.parametrize(("mode", "passes"), [("split", 1), ("split", 4), ("batched", 4)])
def test_the_peak_with_attention_weights(mode, passes):
    model = small_model("2.3", torch.float32)
    predicted, measured = run(model, ClipShape(65, 256, 256, 24.0), passes=passes, mode=mode, kept=True, biased=True)
    compare(f"weighted attention, {passes} {mode}", predicted, measured)


@pytest.mark.parametrize("ulysses", [2, 4])
@pytest.mark.parametrize(("mode", "passes"), [("split", 1), ("split", 4), ("batched", 4)])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "weighted"])
def test_ranks_that_share_a_picture_need_less_and_are_not_planned_short(mode, passes, ulysses, biased):
    model, clip = small_model("2.3", torch.float32, heads=4), ClipShape(65, 256, 256, 24.0)
    predicted, measured = run(model, clip, passes=passes, mode=mode, biased=biased, ulysses=ulysses)
    alone, _ = run(model, clip, passes=passes, mode=mode, biased=biased)
    print(
        f"{ulysses} ranks: predicted {predicted / 1e6:.2f} MB, measured {measured / 1e6:.2f} MB, alone {alone / 1e6:.2f}"
    )
    assert measured <= predicted


# the full-size transformer on the meta device --------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """Joint projections of weights that lie side by side, and PyTorch's attention on a GPU: its result lies as the queries
    do, and unaligned weights are copied."""

    def project(x, linears):
        widths = [linear.out_features for linear in linears]
        return x.plain.new_empty(*x.plain.shape[:-1], sum(widths)).split(widths, dim=-1)

    def attend(q, k, v, bias=None):
        if bias is not None and bias.shape[-1] % 8:
            bias = torch.nn.functional.pad(bias, (0, -bias.shape[-1] % 8))
        return torch.empty_like(q)

    monkeypatch.setattr(heads, "attend", attend)
    monkeypatch.setattr(attention, "project", project)


@pytest.fixture(params=["torch", "fused"])
def fused(request, monkeypatch):
    """Whether kernels are fused; on the meta device they make their results and nothing else."""
    if request.param == "fused":
        pytest.importorskip("triton", reason="triton is not installed")
        from ltx2_engine.kernels import (
            head_gate_triton,
            residual_norm_modulate_triton,
            rms_norm_triton,
            rotary_triton,
        )

        for module in (head_gate_triton, residual_norm_modulate_triton, rms_norm_triton, rotary_triton):
            for name, launch in vars(module).copy().items():
                if hasattr(launch, "registered"):
                    monkeypatch.setattr(module, name, launch.registered)
        monkeypatch.setattr(dispatch, "refusal", lambda device: None)
        for operation in (
            kernels.residual_norm_modulate,
            kernels.qk_norm_rotary,
            kernels.norm_rotary,
            kernels.rms_norm,
            kernels.head_gate,
        ):
            monkeypatch.setattr(operation, "_prove", lambda *_: None)
    return request.param == "fused"


def full_size(label):
    config = replace(TransformerConfig.from_config(released_config(label)), num_layers=3)
    with torch.device("meta"):
        return Transformer(config).to(torch.bfloat16).requires_grad_(False)


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def features(model, text):
    config = model.config
    widths = config.streams.map(lambda own: config.caption_channels or own.context_dim)
    return widths.map(lambda width: empty(1, text, width, dtype=torch.bfloat16))


def inputs(model, count, features, batch=1, levels=1, biased=False):
    def stream(own, count, levels, tables, context):
        index = None if levels == 1 else empty(batch, count, dtype=torch.int64)
        return StreamInput(
            latent=empty(batch, count, own.in_channels, dtype=torch.bfloat16),
            timesteps=Timesteps(empty(batch, levels), index, empty(batch)),
            context=context.expand(batch, -1, -1),
            rotary=tables[0],
            cross_rotary=tables[1],
            attention_bias=empty(batch, 1, count, count, dtype=torch.bfloat16) if biased else None,
        )

    positions = AV(empty(1, 3, count.video, 2), empty(1, 1, count.audio, 2))
    contexts = model.project_contexts(features)
    return model.config.streams.map(stream, count, AV(levels, 1), model.rotary_tables(positions), contexts)


def evaluate_on_meta(label, count, *, fused, passes=1, batch=1, levels=1, biased=False, text=1024):
    """The peak of one evaluation of split passes, and its prediction without what lies outside the model."""
    model = full_size(label)
    with torch.inference_mode(), LiveBytes() as live:
        options = {"batch": batch, "levels": levels, "biased": biased}
        prompts = [features(model, text) for _ in range(min(passes, 2))]
        positive = inputs(model, count, prompts[0], **options)
        contexts = model.project_contexts(prompts[-1])
        negative = positive.map(lambda one, context: replace(one, context=context.expand(batch, -1, -1)), contexts)
        chosen = [
            Pass(positive),
            Pass(negative),
            Pass(positive, Perturbation((1,), (1,))),
            Pass(positive, Perturbation(disable_a2v_cross_attn=True, disable_v2a_cross_attn=True)),
        ]
        model.run_passes(chosen[:passes])
    predicted = sampling_work_bytes(
        model.config,
        count,
        text,
        batch=batch,
        passes=passes,
        mode="split",
        dtype=torch.bfloat16,
        levels=AV(levels, 1),
        biased=AV(biased, False),
        fused=fused,
    )
    return predicted.allocated, live.peak


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize(
    ("label", "height", "width", "frames", "batch", "levels"),
    [
        ("2.0", 512, 768, 121, 1, 1),
        ("2.5", 512, 768, 121, 1, 1),
        ("2.3", 512, 768, 121, 1, 1),
        ("2.3", 512, 768, 121, 1, 2),
        ("2.3", 512, 768, 121, 2, 1),
        ("2.3", 512, 768, 25, 1, 1),
        ("2.3", 768, 1280, 121, 1, 1),
        ("2.3", 1088, 1920, 121, 1, 1),
        ("2.3", 1088, 1920, 121, 1, 2),
    ],
)
def test_the_peak_of_an_evaluation_at_full_size(on_gpu, fused, label, passes, height, width, frames, batch, levels):
    clip = ClipShape(frames, height, width, 24.0)
    count = AV(clip.num_video_tokens, clip.audio_latents)
    predicted, measured = evaluate_on_meta(label, count, fused=fused, passes=passes, batch=batch, levels=levels)
    compare(f"{label}, {width}x{height}x{frames}, {passes} passes", predicted, measured)


@pytest.mark.parametrize("count", [AV(126, 4000), AV(1000, 1000), AV(256, 26)], ids=["sound", "both", "text"])
def test_the_peak_where_another_part_than_the_video_decides(on_gpu, fused, count):
    predicted, measured = evaluate_on_meta("2.3", count, fused=fused)
    compare(f"{count}", predicted, measured)


def test_the_peak_with_a_level_for_every_token(on_gpu, fused):
    predicted, measured = evaluate_on_meta("2.3", AV(3000, 100), fused=fused, levels=3000)
    compare("3000 levels", predicted, measured)


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("count", [32640, 32641], ids=["aligned", "unaligned"])
def test_the_peak_with_attention_weights_at_full_size(on_gpu, fused, passes, count):
    predicted, measured = evaluate_on_meta("2.3", AV(count, 126), fused=fused, passes=passes, biased=True)
    # the weights themselves, from which those of the inputs were made, lie outside the model
    compare(f"{count} weighted tokens, {passes} passes", predicted - 2 * count**2, measured)


def test_the_peak_while_a_packed_weight_is_unpacked(on_gpu):
    unpacked = 1 << 30

    class Unpacking(torch.nn.Linear):
        def forward(self, x):
            weight = torch.empty(unpacked, dtype=torch.uint8, device="meta")
            y = super().forward(x)
            del weight
            return y

    model = full_size("2.3")
    for block in model.blocks:
        for ff in (block.video.ff, block.audio.ff):
            for owner, name in ((ff.net[0], "proj"), (ff.net, "2")):
                old = getattr(owner, name)
                new = Unpacking(old.in_features, old.out_features, device="meta", dtype=torch.bfloat16)
                setattr(owner, name, new.requires_grad_(False))
    count = AV(6144, 126)
    with torch.inference_mode(), LiveBytes() as live:
        prompt = features(model, 1024)
        given = inputs(model, count, prompt)
        model.run_passes([Pass(given)])
    options = {"batch": 1, "passes": 1, "mode": "split", "dtype": torch.bfloat16}
    predicted = sampling_work_bytes(model.config, count, 1024, **options, unpack_bytes=unpacked)
    compare("unpacking 1 GiB", predicted.allocated, live.peak)
    assert predicted.allocated > sampling_work_bytes(model.config, count, 1024, **options).allocated + unpacked // 2


# what the figures mean ------------------------------------------------------------------------------------------------


def test_one_stream_alone():
    config = TransformerConfig.from_config(released_config("2.3"))
    options = {"batch": 1, "passes": 1, "mode": "split", "dtype": torch.bfloat16}
    both = sampling_work_bytes(config, AV(6144, 126), 1024, **options)
    video = sampling_work_bytes(config, AV(6144, None), 1024, **options)
    audio = sampling_work_bytes(config, AV(None, 126), 1024, **options)
    assert audio.allocated < video.allocated < both.allocated


def test_the_allocator_takes_more_than_tensors_do():
    config = TransformerConfig.from_config(released_config("2.3"))
    work = sampling_work_bytes(config, AV(6144, 126), 1024, batch=1, passes=1, mode="split", dtype=torch.bfloat16)
    assert work.reserved - work.allocated == 5 * 6144 * 4096 * 2


def test_an_unknown_mode_is_refused():
    config = TransformerConfig.from_config(released_config("2.3"))
    with pytest.raises(ValueError, match="split or batched"):
        sampling_work_bytes(config, AV(1, 1), 1, batch=1, passes=1, mode="both", dtype=torch.bfloat16)
