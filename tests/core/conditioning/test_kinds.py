"""Every kind of conditioning: what it does to the states, and that sampling gives back what is kept."""

import json

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.audio import (
    KeepAudio,
    ReferenceAudio,
    RetakeAudio,
    Sound,
    reference_audio_positions,
)
from ltx2_engine.ltx2_core.conditioning.extension import ExtendAudio, ExtendVideo, extension
from ltx2_engine.ltx2_core.conditioning.image import ImageCondition
from ltx2_engine.ltx2_core.conditioning.keyframe import (
    GeneratedKeyframes,
    KeyframeCondition,
    evenly_spaced,
    first_last,
    generated_keyframes,
    keyframe_positions,
)
from ltx2_engine.ltx2_core.conditioning.kinds import CONDITIONS
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.conditioning.masks import InpaintVideo, KeepVideo, RetakeVideo, latent_region, region_mask
from ltx2_engine.ltx2_core.conditioning.pixels import clip_pixels
from ltx2_engine.ltx2_core.conditioning.reference import ReferenceVideo, reference_positions
from ltx2_engine.ltx2_core.conditioning.retake import retake
from ltx2_engine.ltx2_core.conditioning.state import (
    audio_positions,
    audio_state,
    patchify_video,
    unpatchify_video,
    video_positions,
    video_state,
)
from ltx2_engine.ltx2_core.conditioning.weighted import AttentionStrength
from ltx2_engine.ltx2_core.sampling.euler import sample_euler
from ltx2_engine.ltx2_core.sampling.noise import TokenNoise, noised
from ltx2_engine.ltx2_core.shapes import ClipShape

CLIP = ClipShape(25, 64, 128, 24.0)  # 4 latent frames of 2 x 4 cells, 26 audio latents
CELLS = 8


def pictures(count=25, height=64, width=128, seed=0):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def sound(seconds=1.2, rate=16000):
    return Sound(torch.rand(2, round(seconds * rate), generator=torch.Generator().manual_seed(1)), rate)


def states(batch=1, dtype=torch.float32, content=0.0):
    video = torch.full((batch, 8, *CLIP.grid), content, dtype=dtype)
    audio = torch.full((batch, 2, CLIP.audio_latents, 4), content, dtype=dtype)
    return AV(video_state(video, CLIP), audio_state(audio))


def left_half():
    mask = torch.zeros(1, 64, 128)
    mask[..., :64] = 1
    return mask


KINDS = {
    "image": ImageCondition(pictures(1)[0], 1.0),
    "keyframe": KeyframeCondition(pictures(1)[0], 17, 0.8),
    "generated keyframes": GeneratedKeyframes((4, 12)),
    "reference video": ReferenceVideo(pictures(), downscale=2, temporal_scale=1),
    "attention strength": AttentionStrength(KeyframeCondition(pictures(1)[0], 3), 0.25),
    "extend video": ExtendVideo(pictures(9), "backward"),
    "extend audio": ExtendAudio(sound(), 9),
    "retake video": RetakeVideo(pictures(), 0.2, 0.5),
    "retake audio": RetakeAudio(sound(), 0.2, 0.5),
    "inpaint video": InpaintVideo(pictures(), left_half()),
    "keep video": KeepVideo(pictures()),
    "keep audio": KeepAudio(sound()),
    "reference audio": ReferenceAudio(sound(0.5)),
}
# what each adds or keeps: appended tokens, or tokens of the target at mask 0
APPENDED = {
    "keyframe": 8,
    "generated keyframes": 16,
    "reference video": 4 * 2,
    "attention strength": 8,
    "reference audio": 13,
}
KEPT = {
    "image": range(8),
    "extend video": range(24, 32),
    "extend audio": range(9),
    "retake video": [*range(8), *range(24, 32)],
    "retake audio": [*range(5), *range(14, 26)],
    "inpaint video": [t for t in range(32) if t % 4 >= 2],
    "keep video": range(32),
    "keep audio": range(26),
}


@pytest.fixture(scope="module")
def vectors(request):
    return json.loads((request.path.parents[2] / "data" / "sampling_vectors.json").read_text())


def test_the_table_names_every_kind():
    assert set(CONDITIONS) == set(KINDS) == set(APPENDED) | set(KEPT)
    assert all(type(KINDS[name]) is kind for name, kind in CONDITIONS.items())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_keeps_the_target_in_front(name, batch, encoders):
    """Twice in a row would be a conflict; here other tokens are there before, so that order and counts show."""
    condition = KINDS[name]
    start = KINDS["reference audio"].apply(KINDS["keyframe"].apply(states(batch), CLIP, encoders), CLIP, encoders)
    latent = AVLatent(CLIP).with_condition(condition)
    latent.check_conditions()
    after = latent.conditioned(start, encoders)
    other = "audio" if condition.stream == "video" else "video"
    assert getattr(after, other) is getattr(start, other)
    before, state = getattr(start, condition.stream), getattr(after, condition.stream)
    n, old = before.num_target, before.latent.shape[1]
    assert state.num_target == n
    added = state.latent.shape[1] - old
    assert added == APPENDED.get(name, 0)
    for tensor in (state.clean, state.mask):
        assert tensor.shape[:2] == (batch, old + added)
    assert state.positions.shape[2] == old + added
    assert torch.equal(state.positions[:, :, :old], before.positions)
    if state.keyframes_mask is not None:
        assert torch.equal(state.keyframes_mask[:, :old], before.keyframes_mask)
        assert bool((state.keyframes_mask[:, old:] == (name == "generated keyframes")).all())
    assert float(state.mask.min()) >= 0
    assert float(state.mask.max()) <= 1
    assert [t for t in range(n) if state.mask[0, t, 0] == 0] == list(KEPT.get(name, ()))
    assert set(state.mask[:, :n].flatten().tolist()) <= {0.0, 1.0}
    assert bool((state.latent[:, old:] == 0).all()), "what is appended must not leak its content through the noise"
    x = torch.randn(batch, old + added, 8)
    assert torch.equal(state.target(x), x[:, :n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_clean_tokens_are_bit_equal_after_sampling(name, dtype, encoders, bf16_encoders):
    chosen = encoders if dtype == torch.float32 else bf16_encoders
    ready = AVLatent(CLIP).with_condition(KINDS[name]).conditioned(states(dtype=dtype), chosen)

    def denoise(x, sigma, **_):
        def blended(x, state):
            x0 = torch.tanh(3 * x.float()) + 0.3 * sigma
            return (x0 * state.mask + state.clean.float() * (1 - state.mask)).to(x.dtype)

        return x.map(blended, ready)

    x = noised(ready, 1.0, TokenNoise(7, torch.device("cpu")))
    end = sample_euler(denoise, x, (1.0, 0.8, 0.3, 0.0), None, None, lambda *_: None)
    state, got = getattr(ready, KINDS[name].stream), getattr(end, KINDS[name].stream)
    kept = state.mask[0, :, 0] == 0
    assert kept.any() == (name in KEPT or name in ("reference video", "attention strength", "reference audio"))
    assert torch.equal(got[:, kept], state.clean[:, kept])
    free = state.mask[0, :, 0] == 1
    assert not torch.equal(got[:, free], state.clean[:, free]) or not free.any()


def test_keyframe_vector(vectors, encoders):
    case = vectors["keyframe_cond"]
    got = keyframe_positions((1, 1, 2), case["frame_idx"], 1, 24.0)
    assert torch.allclose(got[0], torch.tensor(case["appended_positions"]), rtol=1e-6, atol=0)
    clip = ClipShape(25, 32, 64, 24.0)
    state = video_state(torch.zeros(1, 8, *clip.grid), clip)
    condition = KeyframeCondition(pictures(1, 32, 64)[0], case["frame_idx"], case["strength"])
    after = condition.apply(AV(state), clip, encoders).video
    assert after.mask[0, 8:, 0].tolist() == pytest.approx(case["appended_mask"], rel=1e-6)
    assert torch.equal(after.positions[:, :, 8:], got)


def test_a_bf16_keyframe_rounds_its_level(bf16_encoders):
    after = KINDS["keyframe"].apply(states(dtype=torch.bfloat16), CLIP, bf16_encoders).video
    assert after.mask.dtype == torch.float32
    assert after.mask[0, -1, 0].item() == 0.2001953125


@pytest.mark.parametrize(("frame", "start"), [(0, 0), (17, 17), (-1, 24), (-25, 0)])
def test_negative_keyframes_count_from_the_end(frame, start, encoders):
    after = KeyframeCondition(pictures(1)[0], frame).apply(states(), CLIP, encoders).video
    times = after.positions[0, 0, 32:] * 24
    assert torch.allclose(times, torch.tensor([float(start), start + 1.0]).expand(8, 2), atol=1e-5)


def test_a_piece_of_a_clip_as_keyframe():
    """Only where the clip starts does the piece start with a latent of one frame."""
    inside, at_start = (keyframe_positions((2, 1, 1), start, 9, 1.0)[0, 0].tolist() for start in (8, 0))
    assert inside == [[8, 16], [16, 24]]
    assert at_start == [[0, 1], [1, 9]]


def test_slots_vector(vectors, encoders):
    case = vectors["keyframe_slots"]
    clip = ClipShape(25, 32, 64, 24.0)
    state = video_state(torch.zeros(1, 8, *clip.grid), clip)
    after = GeneratedKeyframes(tuple(case["pixel_frames"])).apply(AV(state), clip, encoders).video
    assert after.slots.start == case["first_token"]
    got = after.positions[0, :, case["first_token"] :]
    assert torch.allclose(got, torch.tensor(case["appended_positions"]), rtol=1e-6, atol=0)
    initial = torch.randn(1, 8, 2, 1, 2)
    seeded = GeneratedKeyframes((4, 12), initial).apply(AV(state), clip, encoders).video
    assert torch.equal(generated_keyframes(seeded, seeded.latent, clip), initial)
    assert bool((seeded.clean[:, 8:] == 0).all() and (seeded.mask[:, 8:] == 1).all())


def test_evenly_spaced_keyframes(vectors):
    for case in vectors["evenly_spaced_keyframes"]:
        assert list(evenly_spaced(case["k"], case["num_frames"])) == case["positions"]
    with pytest.raises(ValueError, match="do not fit inside 4 frames: use 1 to 2"):
        evenly_spaced(3, 4)


def test_reference_vector(vectors):
    case = vectors["reference_cond"]
    small = reference_positions(tuple(case["downscale_2_ref_FHW"]), case["fps"], downscale=2)
    assert torch.allclose(small[0], torch.tensor(case["downscale_2_positions"]), rtol=1e-6, atol=0)
    sparse = reference_positions(tuple(case["temporal_2_ref_FHW"]), case["fps"], temporal_scale=2)
    assert torch.allclose(sparse[0, 0], torch.tensor(case["temporal_2_time_positions"]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("count", "scale", "chosen"),
    [
        (25, 1, list(range(25))),
        (40, 1, list(range(25))),
        (20, 1, list(range(17))),
        (25, 2, [0, 1, 3, 5, 7, 9, 11, 13, 15]),
        (25, 3, [0, 1, 4, 7, 10, 13, 16, 19, 22]),
        (5, 2, [0]),
        (1, 4, [0]),
    ],
)
def test_reference_frames(count, scale, chosen, encoders):
    frames = pictures(count, 40, 80)
    reference = ReferenceVideo(frames, downscale=2, temporal_scale=scale)
    assert reference.selected(CLIP) == chosen
    after = reference.apply(states(), CLIP, encoders).video
    assert torch.equal(encoders.seen[0], clip_pixels(frames[chosen], 32, 64))
    assert after.latent.shape[1] - 32 == ((len(chosen) - 1) // 8 + 1) * 2


def test_region_vector(vectors):
    case = vectors["temporal_region_mask"]
    grid = tuple(case["video_FHW"])
    video = region_mask(video_positions(grid, case["fps"]), case["start"], case["end"])
    audio = region_mask(audio_positions(case["audio_frames"]), case["start"], case["end"])
    assert video.tolist() == case["video_mask"]
    assert audio.tolist() == case["audio_mask"]


def test_a_span_leaves_tokens_that_it_only_borders_on():
    """At 8 frames a second the bounds 0, 1/8, 9/8 and 17/8 s are exact."""
    assert region_mask(video_positions((3, 1, 1), 8.0), 1 / 8, 9 / 8).tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ["retake video", "retake audio", "inpaint video"])
def test_a_source_is_where_an_empty_clip_starts_and_a_second_stage_goes_on(name, encoders):
    condition = KINDS[name]
    first, second = (
        getattr(condition.apply(states(content=content), CLIP, encoders), condition.stream) for content in (0.0, 9.0)
    )
    assert torch.equal(first.latent, first.clean)
    assert torch.equal(second.clean, first.clean)
    assert bool((second.latent == 9).all())


def test_inpainting_marks_cells_as_the_encoder_groups_frames():
    """Brute force over cells: frame 0 alone, then eights; a cell counts when over half of it is marked in a frame."""
    mask = (torch.rand(25, 64, 128, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    mask[:9, :32, :32] = 0
    mask[5, :17, :32] = 1
    got = latent_region(mask, CLIP)
    for f, row, column in torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(4)).tolist():
        frames = range(1) if f == 0 else range(8 * f - 7, 8 * f + 1)
        cells = [mask[t, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] for t in frames]
        assert got[f, row, column] == float(any(cell.mean() > 0.5 for cell in cells))
    assert got[0, 0, 0] == 0
    assert got[1, 0, 0] == 1


def test_a_mask_is_cut_as_its_source_is():
    """A source twice as high as the clip loses a quarter above and below, and so does its mask."""
    mask = torch.zeros(1, 256, 128)
    mask[:, 64:128] = 1
    small = torch.nn.functional.interpolate(mask[None], scale_factor=0.5)[0]
    clip = ClipShape(1, 64, 64, 24.0)
    want = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert torch.equal(latent_region(mask, clip), want)
    assert torch.equal(latent_region(small, clip), want)


@pytest.mark.parametrize("index", [0, 2, -1])
def test_an_image_at_a_latent_frame(index, encoders):
    after = ImageCondition(pictures(1)[0], 0.75, latent_index=index).apply(states(), CLIP, encoders).video
    want = torch.ones(4, CELLS)
    want[index] = 0.25
    assert torch.equal(after.mask[0, :, 0], want.flatten())
    grid = unpatchify_video(after.clean, CLIP.grid)
    assert torch.equal(grid[:, :, index], encoders.video(clip_pixels(pictures(1), 64, 128))[:, :, 0])
    assert after.clean.count_nonzero() == CELLS * 8


def test_first_and_last_frame(encoders):
    first, last = first_last(pictures(1)[0], pictures(1, seed=5)[0])
    after = AVLatent(CLIP).with_condition(first, last).conditioned(states(), encoders).video
    assert [t for t in range(40) if after.mask[0, t, 0] == 0] == [*range(8), *range(32, 40)]
    assert after.positions[0, 0, 32:].unique().tolist() == pytest.approx([24 / 24, 25 / 24])


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_extension_keeps_latents_of_the_whole_clip(direction, encoders):
    frames = pictures(17, seed=2)
    whole = patchify_video(encoders.video(clip_pixels(frames, 64, 128)))
    parts = extension(frames, sound(), direction)
    latent = AVLatent(CLIP).with_condition(*parts)
    latent.check_conditions()
    after = latent.conditioned(states(), encoders)
    kept = range(24) if direction == "forward" else range(16, 32)
    assert [t for t in range(32) if after.video.mask[0, t, 0] == 0] == list(kept)
    assert torch.equal(after.video.clean[:, kept.start : kept.stop], whole[:, -len(kept) :])
    # 17 frames last 0.708 s or 18 latents, the last 16 of them 0.667 s or 17
    heard = range(18) if direction == "forward" else range(9, 26)
    assert [t for t in range(26) if after.audio.mask[0, t, 0] == 0] == list(heard)
    assert after.audio.clean[0, heard.start : heard.stop, 0].tolist() == list(range(19 - len(heard), 19))


def test_a_kept_sound_is_cut_or_filled_with_silence(encoders):
    long = KeepAudio(sound(3.0), start=0.5).apply(states(), CLIP, encoders).audio
    assert long.frozen
    assert torch.equal(encoders.seen[0][0], sound(3.0).waveform[:, 8000 : 8000 + round(25 / 24 * 16000)])
    assert long.latent[0, :, 0].tolist() == list(range(1, 27))
    short = KeepAudio(sound(0.5), pad=True).apply(states(), CLIP, encoders).audio
    assert short.latent[0, :, 0].tolist() == [*range(1, 14), *([0] * 13)]
    assert bool((short.mask == 0).all())
    assert torch.equal(noised(AV(None, short), 1.0, TokenNoise(0, torch.device("cpu"))).audio, short.clean)


def test_a_frozen_stream_keeps_references_too(encoders):
    """In either order: a voice beside a sound that is held."""
    both = (KINDS["keep audio"], ReferenceAudio(sound(0.5), strength=0.5))
    for order in (both, both[::-1]):
        latent = AVLatent(CLIP).with_condition(*order)
        latent.check_conditions()
        state = latent.conditioned(states(), encoders).audio
        assert state.frozen
        assert bool((state.mask == 0).all())
        assert state.latent.shape[1] == 26 + 13


def test_reference_audio_ends_one_latent_before_the_clip():
    positions = reference_audio_positions(10)[0, 0]
    assert positions[-1, 1].item() == pytest.approx(-0.04, abs=1e-7)
    assert torch.allclose(positions[:, 1] - positions[:, 0], audio_positions(10)[0, 0].diff(dim=-1)[:, 0], atol=1e-6)
    assert positions[0, 0].item() == pytest.approx(-(0.01 + 9 * 0.04) - 0.04, abs=1e-6)


@pytest.mark.parametrize(("video", "audio"), [(True, True), (True, False), (False, True)])
def test_retake_freezes_what_is_not_made_again(video, audio, encoders):
    latent = AVLatent(CLIP).with_condition(*retake(pictures(), sound(), 0.2, 0.5, video=video, audio=audio))
    latent.check_conditions()
    after = latent.conditioned(states(), encoders)
    assert after.map(lambda state: state.frozen) == AV(not video, not audio)
    assert after.map(lambda state: bool(state.mask.any())) == AV(video, audio)


def test_retake_without_sound_makes_all_of_it(encoders):
    latent = AVLatent(CLIP).with_condition(*retake(pictures(), None, 0.2, 0.5))
    assert bool((latent.conditioned(states(), encoders).audio.mask == 1).all())


def test_clips_of_one_stream():
    assert AVLatent.sound_only(121, 24.0).streams == AV(False, True)
    assert AVLatent.sound_only(121, 24.0).clip.audio_latents == 126
    assert AVLatent.video_only(CLIP).streams == AV(True, False)
    assert AVLatent(CLIP).streams == AV(True, True)
