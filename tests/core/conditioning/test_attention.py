"""Attention weights of conditioning tokens against constructions written out one pair at a time."""

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.attention import attention_bias, extended_mask, token_weights
from ltx2_engine.ltx2_core.conditioning.keyframe import KeyframeCondition
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.conditioning.reference import ReferenceVideo
from ltx2_engine.ltx2_core.conditioning.state import video_state
from ltx2_engine.ltx2_core.conditioning.weighted import AttentionStrength
from ltx2_engine.ltx2_core.shapes import ClipShape

CLIP = ClipShape(17, 64, 128, 24.0)  # 3 latent frames of 2 x 4 cells


def pictures(count, seed=0):
    return torch.rand(count, 64, 128, 3, generator=torch.Generator().manual_seed(seed))


def blank(batch=1, dtype=torch.float32):
    return AV(video_state(torch.zeros(batch, 8, *CLIP.grid, dtype=dtype), CLIP))


def pairwise(num_target, items):
    """Weights from the rules, pair by pair. items: (count, weights or None) in order of appending."""
    owner = [0] * num_target + [i for i, (count, _) in enumerate(items, 1) for _ in range(count)]
    weight = [1.0] * num_target
    for count, weights in items:
        weight += [1.0] * count if weights is None else weights
    first = next(i for i, (_, weights) in enumerate(items, 1) if weights is not None)
    rows = []
    for i, mine in enumerate(owner):
        row = []
        for j, theirs in enumerate(owner):
            if mine == theirs:
                row.append(1.0)
            elif 0 in (mine, theirs):
                row.append(weight[max(i, j)])
            else:
                # what was there before any weights saw all of itself
                row.append(1.0 if max(mine, theirs) < first else 0.0)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "strengths", [(0.25,), (None, 0.5), (0.5, None), (None, None, 0.25, None, 0.75), (0.0, 1.0, 0.5)], ids=str
)
def test_weights_of_several_conditions(strengths, batch, encoders):
    conditions = [KeyframeCondition(pictures(1, seed)[0], seed) for seed in range(len(strengths))]
    wrapped = [
        inner if strength is None else AttentionStrength(inner, strength)
        for inner, strength in zip(conditions, strengths, strict=True)
    ]
    latent = AVLatent(CLIP).with_condition(*wrapped)
    latent.check_conditions()
    state = latent.conditioned(blank(batch), encoders).video
    # full strength is no strength
    items = [(8, None if strength in (None, 1.0) else [strength] * 8) for strength in strengths]
    want = pairwise(24, items)
    assert state.attention_mask.shape == (batch, len(want), len(want))
    for mask in state.attention_mask:
        assert torch.equal(mask, want)


def test_without_weights_there_is_no_mask(encoders):
    for condition in (
        KeyframeCondition(pictures(1)[0], 3),
        AttentionStrength(KeyframeCondition(pictures(1)[0], 3), 1.0),
    ):
        state = condition.apply(blank(), CLIP, encoders).video
        assert state.attention_mask is None
        assert attention_bias(state, torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_is_the_logarithm_and_hides_weight_zero(dtype, encoders):
    conditions = [AttentionStrength(KeyframeCondition(pictures(1)[0], 3), strength) for strength in (0.5, 0.0)]
    state = AVLatent(CLIP).with_condition(*conditions).conditioned(blank(dtype=dtype), encoders).video
    assert state.attention_mask.dtype == dtype
    bias = attention_bias(state, dtype)
    assert bias.shape == (1, 1, 40, 40)
    assert bias.dtype == dtype
    assert set(bias.flatten().tolist()) == {0.0, torch.tensor(0.5, dtype=dtype).log().item(), torch.finfo(dtype).min}
    scores = torch.randn(1, 2, 40, 40, generator=torch.Generator().manual_seed(0))
    attention = (scores + bias.float()).softmax(-1)
    # weights scale the exponentials, which is what the bias means
    weighted = scores.exp() * state.attention_mask.float()[:, None]
    assert torch.allclose(
        attention, weighted / weighted.sum(-1, keepdim=True), atol=1e-2 if dtype == torch.bfloat16 else 1e-6
    )
    assert bool((attention[..., :24, 32:] == 0).all())


@pytest.mark.parametrize(
    ("frames", "grid"), [(1, (1, 2, 4)), (1, (3, 2, 4)), (17, (3, 2, 4)), (33, (3, 1, 2)), (3, (3, 2, 2))]
)
def test_pixel_masks_become_averages_over_cells(frames, grid):
    mask = torch.rand(frames, 64, 128, generator=torch.Generator().manual_seed(2))
    got = token_weights(mask, grid, 0.5).view(grid)
    high, wide = 64 // grid[1], 128 // grid[2]
    group = (frames - 1) // max(1, grid[0] - 1)
    for f, row, column in torch.cartesian_prod(*map(torch.arange, grid)).tolist():
        when = slice(0, 1) if frames == 1 or f == 0 else slice(1 + (f - 1) * group, 1 + f * group)
        cell = mask[when, row * high : (row + 1) * high, column * wide : (column + 1) * wide]
        assert got[f, row, column].item() == pytest.approx(0.5 * cell.mean().item(), abs=1e-6)


@pytest.mark.parametrize(("frames", "grid"), [(16, (3, 2, 4)), (9, (1, 2, 4))])
def test_masks_that_cannot_be_shared_out_are_refused(frames, grid):
    with pytest.raises(ValueError, match=f"{frames} frames cannot be shared out over {grid[0]} latent frames"):
        token_weights(torch.ones(frames, 64, 128), grid, 1.0)


def test_a_mask_follows_the_frames_that_a_reference_takes(encoders):
    """Frames 0, 1, 3, 5 ... of the reference, so the same of its mask."""
    mask = torch.zeros(17, 32, 64)
    mask[1::2, :, :32] = 1.0
    inner = ReferenceVideo(pictures(17), downscale=2, temporal_scale=2)
    state = AttentionStrength(inner, 0.5, mask).apply(blank(), CLIP, encoders).video
    weights = state.attention_mask[0, 0, 24:].view(inner.grid(CLIP))
    assert weights.tolist() == [[[0.0, 0.0]], [[0.5, 0.0]]]
    assert torch.equal(state.attention_mask[0, 24:, 0], weights.flatten())


@pytest.mark.reference
def test_masks_equal_ltx_core(ltx_core):
    from ltx_core.conditioning.mask_utils import build_attention_mask

    weights = torch.rand(2, 3), torch.rand(2, 5)
    theirs = ours = None
    existing = 6
    for one in weights:
        count = one.shape[1]
        theirs = build_attention_mask(theirs, 6, count, existing, one, torch.device("cpu"), torch.float32)
        ours = extended_mask(ours, 6, existing, one)
        existing += count
    assert torch.equal(ours, theirs)


@pytest.mark.reference
def test_appended_tokens_equal_ltx_core(ltx_core, encoders):
    """Positions, levels and content; 1.0.0 also writes the content into the latent and spreads a keyframe over 8 frames."""
    from ltx_core.components.patchifiers import VideoLatentPatchifier
    from ltx_core.conditioning import VideoConditionByKeyframeIndex, VideoConditionByReferenceLatent
    from ltx_core.tools import VideoLatentTools
    from ltx_core.types import VideoLatentShape

    tools = VideoLatentTools(VideoLatentPatchifier(patch_size=1), VideoLatentShape(1, 8, *CLIP.grid), CLIP.fps)
    start = tools.create_initial_state("cpu", torch.float32)
    frames = pictures(17)
    cases = [
        (
            KeyframeCondition(frames[:9], 8, 0.5, crf=0),
            lambda latent: VideoConditionByKeyframeIndex(latent, frame_idx=8, strength=0.5),
            encoders,
        ),
        (
            ReferenceVideo(frames, downscale=2, strength=0.5),
            lambda latent: VideoConditionByReferenceLatent(latent, downscale_factor=2, strength=0.5),
            encoders,
        ),
    ]
    for ours, theirs, chosen in cases:
        got = ours.apply(blank(), CLIP, chosen).video
        latents = chosen.video(chosen.seen[-1])
        want = theirs(latents).apply_to(start, tools)
        assert torch.allclose(got.positions[:, :, 24:], want.positions[:, :, 24:].float(), rtol=1e-6, atol=1e-7)
        assert torch.equal(got.mask[:, 24:], want.denoise_mask[:, 24:])
        assert torch.equal(got.clean[:, 24:], want.clean_latent[:, 24:])
