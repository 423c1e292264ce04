"""The engine on a GPU, tiny checkpoints: close to the CPU, and no step waits for the device."""

from dataclasses import replace

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.image import ImageCondition
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.handles import open_engine
from ltx2_engine.ltx2_core.job import SampleJob
from ltx2_engine.ltx2_core.sampling import samplers
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance
from ltx2_engine.ltx2_core.sampling.samplers import SamplerChoice
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.testing import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

GUIDED = StreamGuidance(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(1,))
SIGMAS = (1.0, 0.7, 0.4, 0.0)


@pytest.fixture(params=["2.0", "2.3"])
def engines(request, tiny_engine):
    """The CPU engine of a version, and one on the GPU in the same precision."""
    cpu = tiny_engine(request.param)
    return cpu, open_engine(replace(cpu.files.spec, device="cuda:0"))


@pytest.fixture
def exact_matmuls():
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def job(engine, latent, guidance=GUIDED):
    prompts = engine.encode("a bell rings"), engine.encode("blurry")
    return SampleJob(latent, *prompts, AV(guidance, guidance), SIGMAS, SamplerChoice("euler"), 3)


def test_the_gpu_agrees_with_the_cpu(engines, exact_matmuls, monkeypatch):
    """The starting noise differs between devices, so both start from the CPU's."""
    cpu, gpu = engines
    randn = torch.randn

    def same_noise(shape, *, generator, dtype, device):
        return randn(shape, generator=torch.Generator().manual_seed(generator.initial_seed()), dtype=dtype).to(device)

    clip = ClipShape(17, 64, 96, 24.0)
    picture = torch.rand(70, 110, 3, generator=torch.Generator().manual_seed(0))
    latent = AVLatent(clip).with_condition(ImageCondition(picture, 0.9, crf=0))
    monkeypatch.setattr(torch, "randn", same_noise)
    want, got = (engine.sample(job(engine, latent)) for engine in (cpu, gpu))
    assert_close("video", got.latents.video, want.latents.video, 1e-3)
    assert_close("audio", got.latents.audio, want.latents.audio, 1e-3)
    ours, theirs = gpu.decode(want, "auto"), cpu.decode(want, "auto")
    assert_close("frames", ours.frames, theirs.frames, 1e-4)
    assert_close("waveform", ours.waveform, theirs.waveform, 1e-3)


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "res_2s", "gradient_estimation", "euler_cfg_pp"])
@pytest.mark.parametrize("evaluation", ["split", "batched"])
def test_no_step_waits_for_the_device(engines, monkeypatch, name, evaluation):
    _, engine = engines
    sampler = samplers.SAMPLERS[name]

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return sampler(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr("ltx2_engine.ltx2_core.engine.SAMPLERS", {name: watched})
    picture = torch.rand(70, 110, 3)
    latent = AVLatent(ClipShape(17, 64, 96, 24.0)).with_condition(ImageCondition(picture, 0.5, crf=0))
    chosen = replace(job(engine, latent), sampler=SamplerChoice(name), evaluation=evaluation)
    assert engine.sample(chosen).latents.video.isfinite().all()


def test_a_seed_gives_the_same_bits(engines):
    _, engine = engines
    latent = AVLatent(ClipShape(17, 64, 96, 24.0))
    first, again = (engine.sample(job(engine, latent)).latents for _ in range(2))
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.audio, again.audio)


def test_memory_is_given_back(engines):
    _, engine = engines
    latent = AVLatent(ClipShape(17, 64, 96, 24.0))
    engine.decode(engine.sample(job(engine, latent)), "auto")
    held = torch.cuda.memory_allocated()
    engine.decode(engine.sample(job(engine, latent)), "auto")
    assert torch.cuda.memory_allocated() == held
    weights = sum(part.bytes_on("cuda:0") for part in (*engine._networks.values(), engine._text_encoder))
    engine.close()
    assert torch.cuda.memory_allocated() <= held - weights
