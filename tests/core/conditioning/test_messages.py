"""What is said about conditioning that cannot work, before any network is read."""

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.audio import KeepAudio, ReferenceAudio, RetakeAudio, Sound
from ltx2_engine.ltx2_core.conditioning.extension import ExtendAudio, ExtendVideo
from ltx2_engine.ltx2_core.conditioning.image import ImageCondition
from ltx2_engine.ltx2_core.conditioning.keyframe import GeneratedKeyframes, KeyframeCondition
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.conditioning.masks import InpaintVideo, KeepVideo, RetakeVideo
from ltx2_engine.ltx2_core.conditioning.reference import ReferenceVideo
from ltx2_engine.ltx2_core.conditioning.retake import retake
from ltx2_engine.ltx2_core.conditioning.state import video_state
from ltx2_engine.ltx2_core.conditioning.weighted import AttentionStrength
from ltx2_engine.ltx2_core.shapes import ClipShape

CLIP = ClipShape(25, 64, 96, 24.0)  # 4 latent frames, 1.042 s, 26 audio latents
PICTURE = torch.zeros(64, 96, 3)


def video(count, height=64, width=96):
    return torch.zeros(count, height, width, 3)


def sound(seconds, rate=16000, channels=2):
    return Sound(torch.zeros(channels, round(seconds * rate)), rate)


def mask(count=1, height=64, width=96, value=1.0):
    return torch.full((count, height, width), value)


MESSAGES = [
    (ImageCondition(PICTURE, 1.5), r"strength of the first image is 1.5; it must lie between 0 and 1"),
    (ImageCondition(PICTURE, float("nan")), r"is nan; it must lie between 0 and 1"),
    (ImageCondition(PICTURE[..., 0], 1.0), r"must be \[height, width, 3\] or .* found \[64, 96\]"),
    (ImageCondition(PICTURE, 1.0, crf=60), r"crf is 60; choose 0 \(none\) to 51"),
    (ImageCondition(video(9), 1.0, crf=20), r"crf 20 is for single images, but there are 9 frames"),
    (
        ImageCondition(PICTURE, 1.0, latent_index=4),
        r"latent frame 4 is outside the clip, which has latent frames 0 to 3",
    ),
    (ImageCondition(video(17), 1.0, latent_index=2), r"3 latent frames \(17 frames\) .* use an index up to 1"),
    (ImageCondition(video(12), 1.0), r"has 12 frames; the model encodes 8k \+ 1. Nearest: 9 or 17"),
    (KeyframeCondition(PICTURE, 25), r"keyframe at frame 25 is outside the clip, which has frames 0 to 24"),
    (KeyframeCondition(PICTURE, -26), r"keyframe at frame -26 is outside the clip"),
    (KeyframeCondition(video(9), 20), r"has 9 frames and would end behind the clip's last, 24: start at 16 or before"),
    (KeyframeCondition(PICTURE, 3, -0.1), r"strength of the keyframe at frame 3 is -0.1"),
    (GeneratedKeyframes((8, 8)), r"stand at \[8, 8\]: give frames that rise"),
    (GeneratedKeyframes(()), r"give frames that rise"),
    (GeneratedKeyframes((8, 25)), r"not all inside the clip, which has frames 0 to 24"),
    (GeneratedKeyframes((8,), torch.zeros(1, 8, 2, 2, 3)), r"needed are \[batch, channels, 1, 2, 3\]"),
    (
        ReferenceVideo(video(9), downscale=2),
        r"2 times smaller than the clip, so the width must be a multiple of 64, not 96",
    ),
    (ReferenceVideo(video(9), downscale=0), r"downscale factor of the reference video is 0; it must be 1 or more"),
    (ReferenceVideo(video(9), temporal_scale=0), r"temporal scale factor of the reference video is 0"),
    (ReferenceVideo(PICTURE), r"must be \[frames, height, width, 3\], found \[64, 96, 3\]"),
    (ReferenceVideo(video(9), strength=2), r"strength of the reference video is 2"),
    (AttentionStrength(ReferenceVideo(video(9)), 1.2), r"attention strength of the reference video is 1.2"),
    (AttentionStrength(ReferenceVideo(video(9)), 0.5, mask(4)), r"has 4 frames; it needs 1, or 9"),
    (AttentionStrength(ReferenceVideo(video(9)), 0.5, mask(1, 96, 96)), r"is 96x96 and what it lies over 96x64"),
    (
        AttentionStrength(ImageCondition(PICTURE, 1.0), 0.5),
        r"for keyframes and references; the first image adds no tokens",
    ),
    (AttentionStrength(ReferenceAudio(sound(1)), 0.5, mask()), r"a mask is for pictures|takes only a strength"),
    (AttentionStrength(KeyframeCondition(PICTURE, 30), 0.5), r"keyframe at frame 30 is outside"),
    (ExtendVideo(video(9), "sideways"), r"direction is 'sideways'; choose forward or backward"),
    (ExtendVideo(video(10)), r"clip to extend has 10 frames; .* Nearest: 9 or 17"),
    (ExtendVideo(video(25)), r"has 25 frames, the whole clip 25: nothing would be left to make"),
    (ExtendVideo(video(1), "backward"), r"needs 9 frames or more"),
    (ExtendVideo(PICTURE), r"clip to extend must be \[frames, height, width, 3\]"),
    (ExtendAudio(sound(0.2), 9), r"sound to extend lasts 0.20 s, the clip 0.38 s"),
    (ExtendAudio(sound(2), 12), r"has 12 frames; .* Nearest: 9 or 17"),
    (RetakeVideo(video(17), 0.2, 0.5), r"source video has 17 frames, the clip 25: they must be equal"),
    (RetakeVideo(video(20), 0.2, 0.5), r"source video has 20 frames; .* Nearest: 17 or 25"),
    (RetakeVideo(video(25), 0.5, 0.5), r"starts at 0.5 s and ends at 0.5 s: the end must come after the start"),
    (RetakeVideo(video(25), 0.5, 2.0), r"0.5 to 2 s is not inside the clip, which lasts from 0 to 1.042 s"),
    (RetakeVideo(video(25), -0.5, 0.5), r"is not inside the clip"),
    (RetakeVideo(video(25), float("nan"), 0.5), r"end must come after the start"),
    (
        RetakeAudio(sound(0.5), 0.1, 0.2),
        r"source sound lasts 0.50 s, the clip 1.04 s: use a longer sound or a shorter clip",
    ),
    (RetakeAudio(sound(2), 0.4, 0.2), r"end must come after the start"),
    (RetakeAudio(sound(2), 1.035, 1.04), r"lies behind the sound's last latent"),
    (InpaintVideo(video(25), mask(3)), r"inpainting mask has 3 frames; it needs 1, or 25"),
    (
        InpaintVideo(video(25), mask(1, 64, 64)),
        r"is 64x64 and what it lies over 96x64: .* aspect ratio must be the same",
    ),
    (InpaintVideo(video(25), mask()[0]), r"must be \[frames, height, width\], found \[64, 96\]"),
    (InpaintVideo(video(25), mask(value=2.0)), r"values from 2 to 2; they must lie between 0 and 1"),
    (InpaintVideo(video(25), mask(value=float("nan"))), r"they must lie between 0 and 1"),
    (InpaintVideo(video(25), mask(value=0.0)), r"marks nothing to make again"),
    (InpaintVideo(video(17), mask()), r"source video has 17 frames, the clip 25"),
    (KeepVideo(video(33)), r"the video that is kept has 33 frames, the clip 25"),
    (KeepAudio(sound(0.9)), r"lasts 0.90 s, the clip 1.04 s: .* or allow silence at its end"),
    (KeepAudio(sound(0.01), pad=True), r"too short: 160 samples at 16000 Hz last 0.010 s, at least 0.04 s"),
    (KeepAudio(sound(2), start=2.5), r"start at 2.5 s, but lasts from 0 to 2.00 s"),
    (KeepAudio(sound(2), start=1.5), r"lasts 0.50 s, the clip 1.04 s"),
    (KeepAudio(sound(2, rate=100)), r"sample rate of 100 Hz; 1000 to 768000 Hz can be used"),
    (KeepAudio(Sound(torch.zeros(1, 2, 16000), 16000)), r"must be \[channels, samples\], found \[1, 2, 16000\]"),
    (ReferenceAudio(sound(1), 1.1), r"strength of the reference sound is 1.1"),
    (ReferenceAudio(sound(301, rate=1000)), r"lasts 301 s; use at most 300 s"),
]


@pytest.mark.parametrize(("condition", "message"), MESSAGES, ids=lambda value: getattr(value, "label", ""))
def test_bad_input_is_named(condition, message):
    with pytest.raises(ValueError, match=message):
        AVLatent(CLIP).with_condition(condition).check_conditions()


@pytest.mark.parametrize(
    "condition",
    [
        KeyframeCondition(PICTURE, 24),
        KeyframeCondition(PICTURE, -25),
        ImageCondition(video(25), 0.0),
        KeepAudio(sound(0.97)),
        RetakeVideo(video(25), 0.0, 25 / 24),
        InpaintVideo(video(25, 32, 48), mask(1, 64, 96)),
        InpaintVideo(video(25, 67, 101), mask(25, 33, 50)),
        ReferenceAudio(sound(0.04)),
        ReferenceVideo(video(3, 10, 10)),
    ],
    ids=lambda value: value.label,
)
def test_what_just_fits_is_taken(condition):
    AVLatent(CLIP).with_condition(condition).check_conditions()


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            ImageCondition(PICTURE, 1.0),
            ExtendVideo(video(9)),
            r"first image and the forward extension both decide latent frames 0 to 0 of the video",
        ),
        (
            RetakeVideo(video(25), 0.2, 0.5),
            ImageCondition(PICTURE, 1.0, latent_index=-1),
            r"latent frames 3 to 3 of the video",
        ),
        (KeepAudio(sound(2)), RetakeAudio(sound(2), 0.2, 0.5), r"latent frames 0 to 25 of the audio"),
        (ExtendVideo(video(17)), ExtendVideo(video(17), "backward"), r"latent frames 2 to 2"),
    ],
)
def test_two_conditions_for_the_same_frames_are_refused(one, other, message):
    with pytest.raises(ValueError, match=message):
        AVLatent(CLIP).with_condition(one, other).check_conditions()


def test_a_clip_makes_one_set_of_keyframes(encoders):
    state = AV(video_state(torch.zeros(1, 8, *CLIP.grid), CLIP))
    latent = AVLatent(CLIP).with_condition(GeneratedKeyframes((4,)), GeneratedKeyframes((8,)))
    with pytest.raises(ValueError, match="one set of generated keyframes"):
        latent.conditioned(state, encoders)


def test_what_lies_side_by_side_is_no_conflict():
    """Also the same latent indices of video and sound, and keyframes over anything."""
    AVLatent(CLIP).with_condition(
        ExtendVideo(video(9)),
        ExtendVideo(video(9), "backward"),
        ImageCondition(PICTURE, 1.0, latent_index=2),
        KeepAudio(sound(2)),
        KeyframeCondition(PICTURE, 0),
        KeyframeCondition(PICTURE, 0),
    ).check_conditions()


def test_a_mask_of_the_latent_and_a_source_exclude_each_other():
    masks = AV(torch.ones(1, 1, *CLIP.grid))
    AVLatent(CLIP, masks=masks).with_condition(ImageCondition(PICTURE, 1.0), KeepAudio(sound(2))).check_conditions()
    with pytest.raises(
        ValueError, match=r"retake of the video decides what is kept .* so does the latent's noise mask"
    ):
        AVLatent(CLIP, masks=masks).with_condition(RetakeVideo(video(25), 0.2, 0.5)).check_conditions()


@pytest.mark.parametrize(
    ("latent", "condition", "message"),
    [
        (AVLatent.video_only(CLIP), KeepAudio(sound(2)), "sound that is kept cannot be used: the clip has no sound"),
        (AVLatent.sound_only(25, 24.0), KeyframeCondition(PICTURE, 0), "keyframe at frame 0 .* the clip has no video"),
    ],
)
def test_conditions_on_a_stream_that_is_not_there_are_refused(latent, condition, message):
    with pytest.raises(ValueError, match=message):
        latent.with_condition(condition).check_conditions()


@pytest.mark.parametrize(
    ("audio_in", "again", "message"),
    [
        (True, (False, False), "choose at least one"),
        (False, (True, False), "there is no sound to keep"),
    ],
)
def test_retakes_that_make_nothing_are_refused(audio_in, again, message):
    with pytest.raises(ValueError, match=message):
        retake(video(25), sound(2) if audio_in else None, 0.2, 0.5, video=again[0], audio=again[1])
