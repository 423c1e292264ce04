"""The transformer against diffusers 0.42.1 and ltx-core 1.0.0, tiny random weights.

Both oracles take the audio-video scale and shift from the other stream's sigma, where ltx-core 1.2 (our reference)
takes them from the stream's own timesteps. Two forward pre-hooks put the own timesteps in.
"""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.config.transformer import TransformerConfig
from ltx2_engine.ltx2_core.loading.keymap import checkpoint_name
from ltx2_engine.ltx2_core.testing import assert_close, cosine
from ltx2_engine.ltx2_core.transformer.inputs import Perturbation, StreamInput, Timesteps, plan_keeps
from ltx2_engine.ltx2_core.transformer.model import Transformer

pytestmark = pytest.mark.reference

PREFIX = "model.diffusion_model."
TINY = {
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "audio_in_channels": 16,
    "audio_out_channels": 16,
    "cross_attention_dim": 128,
    "audio_cross_attention_dim": 64,
    "caption_channels": 48,
}


def tiny_config(version):
    """2.3s is 2.3 without the timestep modulation of the text."""
    config = released_config(version[:3])["transformer"] | TINY
    return config | {"use_prompt_adaln_single": False} if version == "2.3s" else config


def random_model(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.from_config({"transformer": config})).to(dtype)
    for name, parameter in model.named_parameters():
        near_one = name.endswith(("q_norm.weight", "k_norm.weight"))
        parameter.data = (torch.randn(parameter.shape) * 0.15 + near_one).to(dtype)
    return model.requires_grad_(False)


def checkpoint_state(model):
    return {checkpoint_name("transformer", name)[len(PREFIX) :]: value for name, value in model.state_dict().items()}


@dataclass(frozen=True)
class Case:
    """Tokens, levels and perturbations of one call; ``mask`` is the share of sigma per token, None = all 1."""

    batch: int = 1
    first_frame: bool = False
    audio_sigma: float = 0.7
    perturbations: tuple = ()
    split: bool = False

    grid = (3, 2, 3)
    audio_tokens = 7
    fps = 24.0

    @property
    def sigma(self):
        return AV(torch.tensor([0.7, 0.4])[: self.batch], torch.tensor([self.audio_sigma, 0.9])[: self.batch])

    @property
    def masks(self):
        frames, height, width = self.grid
        video = torch.ones(self.batch, frames * height * width)
        if self.first_frame:
            video[:, : height * width] = 0.0
        return AV(video, torch.ones(self.batch, self.audio_tokens))

    @property
    def positions(self):
        t, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in self.grid), indexing="ij")
        start = torch.stack((t * 8, y * 32, x * 32)).flatten(1)
        bounds = torch.stack((start, start + torch.tensor([8.0, 32.0, 32.0])[:, None]), -1)
        bounds[0] = (bounds[0] - 7).clamp(min=0) / self.fps
        step = torch.arange(float(self.audio_tokens + 1))
        edges = (4 * step - 3).clamp(min=0) * 160 / 16000
        audio = torch.stack((edges[:-1], edges[1:]), -1)[None]
        return AV(*(p[None].repeat(self.batch, 1, 1, 1) for p in (bounds, audio)))

    def tensors(self, config, dtype):
        """Latents and text features; the audio features of 2.0 have the caption width."""
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        projected = config.get("caption_proj_before_connector", False)
        widths = (config["cross_attention_dim"], config["audio_cross_attention_dim"])
        video_width, audio_width = widths if projected else (config["caption_channels"],) * 2
        tokens = AV(self.masks.video.shape[1], self.audio_tokens)
        latents = tokens.map(lambda n: draw(self.batch, n, config["in_channels"]))
        return latents, AV(draw(self.batch, 5, video_width), draw(self.batch, 5, audio_width))


CASES = {
    "text_to_video": Case(),
    "first_frame": Case(first_frame=True),
    "unequal_audio_sigma": Case(audio_sigma=0.3),
    "batch_of_two": Case(batch=2, first_frame=True, audio_sigma=0.25),
    "stg": Case(perturbations=(Perturbation((1,), (1,)),)),
    "modality": Case(perturbations=(Perturbation((), (), True, True),), first_frame=True),
    "stg_split": Case(perturbations=(Perturbation((1,), (1,)),), split=True, first_frame=True),
    "modality_split": Case(perturbations=(Perturbation((), (), True, True),), split=True),
    "mixed_batch": Case(batch=2, perturbations=(Perturbation(), Perturbation((0, 2), (0, 2))), first_frame=True),
    "mixed_modality": Case(batch=2, perturbations=(Perturbation((), (), True, True), Perturbation())),
}


def keyframes(case):
    frames, height, width = case.grid
    mask = torch.zeros(case.batch, frames * height * width, 1)
    mask[:, : height * width] = 1
    return mask


def ours(model, case, config, dtype):
    latents, features = case.tensors(config, dtype)
    contexts = model.project_contexts(features)
    tables = model.rotary_tables(case.positions)

    def stream(latent, context, tables, mask, sigma):
        levels = mask.unique()  # the distinct mask values, each one a row
        index = None if len(levels) == 1 else torch.searchsorted(levels, mask)
        times = Timesteps(sigma[:, None] * levels, index, sigma)
        return StreamInput(latent, times, context, *tables)

    inputs = latents.map(stream, contexts, tables, case.masks, case.sigma)
    if config.get("use_keyframes_abs_pos_embedding"):
        inputs = AV(replace(inputs.video, keyframes_mask=keyframes(case)), inputs.audio)
    if case.split:
        (one,) = case.perturbations
        flags = {name: getattr(one, name) for name in one.__dataclass_fields__}
        return model(inputs, **flags)
    keeps = None
    if case.perturbations:
        keeps = plan_keeps(case.perturbations, config["num_layers"], torch.device("cpu"), dtype)
    return model(inputs, keeps=keeps)


def own_timesteps(module, timesteps):
    """Hook that puts the stream's own timesteps (already x 1000) in place of the other stream's sigma."""
    module.register_forward_pre_hook(
        lambda _, args, kwargs: ((timesteps.flatten(), *args[1:]), kwargs), with_kwargs=True
    )


def from_diffusers(diffusers, state, case, config, keys, dtype):
    tiny = TINY | {
        "perturbed_attn": True,
        "use_prompt_adaln_single": config.get("use_prompt_adaln_single", True),
    }
    model = diffusers.LTX2VideoTransformer3DModel(**(keys["diffusers_config"] | tiny))
    model.load_state_dict({diffusers_name(name): value.float() for name, value in state.items()}, strict=True)
    model = model.to(dtype).requires_grad_(False)
    latents, features = case.tensors(config, dtype)
    timesteps = case.masks.map(lambda mask, sigma: 1000 * mask * sigma[:, None], case.sigma)
    own_timesteps(model.av_cross_attn_video_scale_shift, timesteps.video)
    own_timesteps(model.av_cross_attn_audio_scale_shift, timesteps.audio)
    skips = [bool(p.skip_video_self_attn_blocks) for p in case.perturbations]
    isolates = [p.disable_a2v_cross_attn for p in case.perturbations]
    if any(isolates) and not all(isolates):
        pytest.skip("diffusers isolates modalities for a whole call only")
    extra = {}
    if any(skips):
        blocks = next(p.skip_video_self_attn_blocks for p in case.perturbations if p.skip_video_self_attn_blocks)
        extra = {
            "spatio_temporal_guidance_blocks": list(blocks),
            "perturbation_mask": 1 - torch.tensor(skips, dtype=dtype),
        }
    if config.get("use_keyframes_abs_pos_embedding"):
        extra["video_keyframes_mask"] = keyframes(case)
    sigma = case.sigma.map(lambda s: 1000 * s)
    video, audio = model(
        hidden_states=latents.video,
        audio_hidden_states=latents.audio,
        encoder_hidden_states=features.video,
        audio_encoder_hidden_states=features.audio,
        timestep=timesteps.video,
        audio_timestep=timesteps.audio,
        sigma=sigma.video,
        audio_sigma=sigma.audio,
        video_coords=case.positions.video,
        audio_coords=case.positions.audio,
        use_cross_timestep=True,
        isolate_modalities=any(isolates),
        return_dict=False,
        **extra,
    )
    return AV(video, audio)


FIRST = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
ANYWHERE = {
    "q_norm": "norm_q",
    "k_norm": "norm_k",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
}


def diffusers_name(name):
    first, *rest = name.split(".")
    return ".".join(
        [FIRST.get(first, first), *rest] if first in FIRST else [ANYWHERE.get(p, p) for p in [first, *rest]]
    )


def from_ltx_core(state, case, config, dtype):
    from ltx_core.guidance.perturbations import (
        BatchedPerturbationConfig,
        PerturbationConfig,
        PerturbationType,
    )
    from ltx_core.guidance.perturbations import Perturbation as TheirPerturbation
    from ltx_core.model.transformer import LTXModelConfigurator, Modality

    model = LTXModelConfigurator.from_config({"transformer": config})
    # it builds the caption projections of 2.0 on the meta device
    model.load_state_dict(state, strict=True, assign=True)
    model = model.to(dtype).requires_grad_(False)
    latents, features = case.tensors(config, dtype)
    timesteps = case.masks.map(lambda mask, sigma: mask * sigma[:, None], case.sigma)
    own_timesteps(model.av_ca_video_scale_shift_adaln_single, timesteps.video * 1000)
    own_timesteps(model.av_ca_audio_scale_shift_adaln_single, timesteps.audio * 1000)

    def theirs(p):
        kinds = {
            PerturbationType.SKIP_VIDEO_SELF_ATTN: list(p.skip_video_self_attn_blocks),
            PerturbationType.SKIP_AUDIO_SELF_ATTN: list(p.skip_audio_self_attn_blocks),
            PerturbationType.SKIP_A2V_CROSS_ATTN: None if p.disable_a2v_cross_attn else [],
            PerturbationType.SKIP_V2A_CROSS_ATTN: None if p.disable_v2a_cross_attn else [],
        }
        return PerturbationConfig([TheirPerturbation(kind, blocks) for kind, blocks in kinds.items() if blocks != []])

    perturbations = case.perturbations or (Perturbation(),) * case.batch
    modalities = latents.map(
        lambda latent, sigma, times, positions, context: Modality(
            latent=latent, sigma=sigma, timesteps=times, positions=positions, context=context
        ),
        case.sigma,
        timesteps,
        case.positions,
        features,
    )
    config = BatchedPerturbationConfig([theirs(p) for p in perturbations])
    return AV(*model(modalities.video, modalities.audio, config))


@pytest.fixture(scope="module")
def keys(request):
    path = request.path.parents[2] / "data" / "transformer_keys.json"
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", ["2.0", "2.3", "2.3s", "2.5"])
def test_float32_equals_diffusers(diffusers, keys, version, case):
    config = tiny_config(version)
    model = random_model(config)
    want = from_diffusers(diffusers, checkpoint_state(model), CASES[case], config, keys[version[:3]], torch.float32)
    got = ours(model, CASES[case], config, torch.float32)
    assert_close(f"{version} {case} video", got.video, want.video, 1e-5)
    assert_close(f"{version} {case} audio", got.audio, want.audio, 1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_float32_equals_ltx_core(ltx_core, version, case):
    config = tiny_config(version)
    model = random_model(config)
    want = from_ltx_core(checkpoint_state(model), CASES[case], config, torch.float32)
    got = ours(model, CASES[case], config, torch.float32)
    assert_close(f"{version} {case} video", got.video, want.video, 1e-5)
    assert_close(f"{version} {case} audio", got.audio, want.audio, 1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_bfloat16_is_bit_equal_to_ltx_core(ltx_core, version, case):
    config = tiny_config(version)
    model = random_model(config, torch.bfloat16)
    want = from_ltx_core(checkpoint_state(model), CASES[case], config, torch.bfloat16)
    got = ours(model, CASES[case], config, torch.bfloat16)
    assert torch.equal(got.video, want.video)
    assert torch.equal(got.audio, want.audio)


@pytest.mark.parametrize("version", ["2.0", "2.3", "2.5"])
def test_bfloat16_is_close_to_diffusers(diffusers, keys, version):
    case, config = CASES["first_frame"], tiny_config(version)
    model = random_model(config, torch.bfloat16)
    want = from_diffusers(diffusers, checkpoint_state(model), case, config, keys[version], torch.bfloat16)
    got = ours(model, case, config, torch.bfloat16)
    for name, a, b in (("video", got.video, want.video), ("audio", got.audio, want.audio)):
        print(f"{version} {name} cosine {cosine(a, b):.6f}")
        assert cosine(a, b) >= 0.9999
