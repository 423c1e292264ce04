"""The tiny checkpoints: in the released layout, and what ltx-core's own loader makes of them."""

import json

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.condition_encoders import ModelEncoders
from ltx2_engine.ltx2_core.conditioning import state as tokens
from ltx2_engine.ltx2_core.conditioning.image import ImageCondition
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.job import SampleJob
from ltx2_engine.ltx2_core.loading.build import check
from ltx2_engine.ltx2_core.loading.checkpoint import read_header
from ltx2_engine.ltx2_core.networks import build_on_meta
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance
from ltx2_engine.ltx2_core.sampling.noise import TokenNoise, noised
from ltx2_engine.ltx2_core.sampling.samplers import SamplerChoice
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.testing import assert_close, unfold_blocks
from ltx2_engine.ltx2_core.tiny import checkpoint_file, tiny_config, write_tiny_checkpoint, write_tiny_set

CLIP = ClipShape(17, 64, 96, 24.0)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("label", ["2.0", "2.3"])
def test_names_dtypes_and_metadata_are_those_of_the_release(tiny_models, request, label):
    header = read_header(tiny_models / "checkpoints" / checkpoint_file(label))
    assert json.loads(header.metadata["config"]) == tiny_config(label)
    assert header.metadata["model_version"] == f"{label}.0"
    kinds = {info.dtype for name, info in header.tensors.items() if name.endswith("scale_shift_table")}
    assert kinds == {"F32"}
    keys = json.loads((request.path.parents[1] / "data" / "transformer_keys.json").read_text())
    names = {n for n in header.tensors if n.startswith("model.") and "_embeddings_connector." not in n}
    assert names == set(unfold_blocks(keys[label]["tensors"], num_layers=3))


def test_the_2_5_file_holds_the_transformer_and_its_connectors(tmp_path):
    path = tmp_path / "ltx-2.5-tiny.safetensors"
    write_tiny_checkpoint(path, "2.5")
    header = read_header(path)
    assert header.version().label == "2.5"
    assert "model.diffusion_model.keyframes_abs_pos_embedding" in header.tensors
    assert "model.diffusion_model.transformer_blocks.0.ff.net.0.proj.bias" not in header.tensors
    assert {name.split(".")[0] for name in header.tensors} == {"model"}


@pytest.mark.parametrize(
    ("label", "layout", "folders"),
    [
        ("2.0", None, ["checkpoints", "text_encoders", "loras", "latent_upscale_models"]),
        (
            "2.3",
            "split",
            ["diffusion_models", "vae", "vae", "text_encoders", "text_encoders", "loras", "latent_upscale_models"],
        ),
        ("2.5", None, ["diffusion_models", "vae", "vae", "text_encoders", "loras", "latent_upscale_models"]),
    ],
)
def test_a_set_lies_in_comfyuis_folders(tmp_path, label, layout, folders):
    paths = write_tiny_set(tmp_path, label, layout)
    assert [path.relative_to(tmp_path).parts[0] for path in paths] == folders
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize(
    ("label", "layout", "message"),
    [
        ("2.4", None, r"choose 2\.0, 2\.3, 2\.5"),
        ("2.3", "half", "choose full or split"),
        ("2.5", "full", "no layout 'full' of version 2.5; choose split"),
    ],
)
def test_sets_that_cannot_be(tmp_path, label, layout, message):
    with pytest.raises(ValueError, match=message):
        write_tiny_set(tmp_path, label, layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("label", ["1.0", "2.4"])
def test_other_versions_are_refused(tmp_path, label):
    with pytest.raises(ValueError, match=r"choose 2\.0, 2\.3, 2\.5"):
        write_tiny_checkpoint(tmp_path / "x.safetensors", label)


def loaded_by_ltx_core(path, configurator, operations):
    from ltx_core.loader import SingleGPUModelBuilder

    builder = SingleGPUModelBuilder(
        model_class_configurator=configurator, model_path=str(path), model_sd_ops=operations
    )
    model = builder.build(device=torch.device("cpu"), dtype=torch.float32)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "ltx-core left tensors empty"
    return model.requires_grad_(False)


@pytest.mark.reference
@pytest.mark.parametrize("first_image", [False, True], ids=["text_to_video", "first_frame"])
@pytest.mark.parametrize("label", ["2.0", "2.3"])
def test_ltx_core_loads_the_transformer_and_takes_the_same_step(ltx_core, tiny_models, tiny_engine, label, first_image):
    from ltx_core.guidance.perturbations import BatchedPerturbationConfig, PerturbationConfig
    from ltx_core.model.transformer import LTXV_MODEL_COMFY_RENAMING_MAP, LTXModelConfigurator, Modality

    engine = tiny_engine(label)
    latent = AVLatent(CLIP)
    if first_image:
        picture = torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(0))
        latent = latent.with_condition(ImageCondition(picture, 1.0, crf=0))
    context = engine.encode("a bell rings")
    off = AV(StreamGuidance(), StreamGuidance())
    got = engine.sample(SampleJob(latent, context, None, off, (1.0, 0.0), SamplerChoice("euler"), 7)).latents

    path = tiny_models / "checkpoints" / checkpoint_file(label)
    model = loaded_by_ltx_core(path, LTXModelConfigurator, LTXV_MODEL_COMFY_RENAMING_MAP)
    states = latent.conditioned(engine._states(latent), ModelEncoders(engine))
    x = noised(states, 1.0, TokenNoise(7, torch.device("cpu")))
    times = states.map(lambda state: state.mask[..., 0])  # sigma is 1
    for module, own in (
        (model.av_ca_video_scale_shift_adaln_single, times.video),
        (model.av_ca_audio_scale_shift_adaln_single, times.audio),
    ):
        # ltx-core 1.0.0 gives these modules the other stream's sigma; 1.2 gives them their own timesteps
        module.register_forward_pre_hook(
            lambda _, args, kwargs, own=own: ((own.flatten() * 1000, *args[1:]), kwargs), with_kwargs=True
        )
    modalities = x.map(
        lambda x, t, state, text: Modality(
            latent=x, sigma=torch.ones(1), timesteps=t, positions=state.positions, context=text
        ),
        times,
        states,
        context.features,
    )
    velocity = AV(*model(modalities.video, modalities.audio, BatchedPerturbationConfig([PerturbationConfig(None)])))
    want = x.map(lambda x, v, t: x - v * t[..., None], velocity, times)
    assert_close("video", tokens.patchify_video(got.video), want.video, 1e-4)
    assert_close("audio", tokens.patchify_audio(got.audio), want.audio, 1e-4)


@pytest.mark.reference
@pytest.mark.parametrize("label", ["2.0", "2.3"])
def test_ltx_core_loads_the_vaes_and_the_vocoder(ltx_core, tiny_models, tiny_engine, label):
    from ltx_core.model import audio_vae, video_vae

    engine, path = tiny_engine(label), tiny_models / "checkpoints" / checkpoint_file(label)
    noise = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 2, 3, generator=noise)
    sound = torch.randn(1, 2, 9, 16, generator=noise)

    decoder = loaded_by_ltx_core(path, video_vae.VideoDecoderConfigurator, video_vae.VAE_DECODER_COMFY_KEYS_FILTER)
    pixels = engine._networks["video_decoder"].use(0)(latents)
    assert_close("video decoder", pixels, decoder(latents), 1e-5)
    encoder = loaded_by_ltx_core(path, video_vae.VideoEncoderConfigurator, video_vae.VAE_ENCODER_COMFY_KEYS_FILTER)
    assert_close("video encoder", engine._networks["video_encoder"].use(0)(pixels), encoder(pixels), 1e-5)
    audio = loaded_by_ltx_core(path, audio_vae.AudioDecoderConfigurator, audio_vae.AUDIO_VAE_DECODER_COMFY_KEYS_FILTER)
    mel = engine._networks["audio_decoder"].use(0)(sound)
    assert_close("audio decoder", mel, audio(sound), 1e-5)
    vocoder = loaded_by_ltx_core(path, audio_vae.VocoderConfigurator, audio_vae.VOCODER_COMFY_KEYS_FILTER)
    assert_close("vocoder", engine._networks["vocoder"].use(0)(mel), vocoder(mel), 1e-5)


@pytest.mark.parametrize("label", ["2.0", "2.3"])
def test_every_network_of_the_tiny_set_passes_the_strict_check(tiny_engine, label):
    files = tiny_engine(label).files
    for name in (
        "transformer",
        "text_head",
        "video_encoder",
        "video_decoder",
        "audio_encoder",
        "audio_decoder",
        "vocoder",
    ):
        check(build_on_meta(name, files.config), files.checkpoint, name)
