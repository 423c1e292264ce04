"""Files are judged by decoding them again with PyAV and Pillow."""

import io
import json
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from ltx2_engine.ltx2_core import media
from ltx2_engine.ltx2_core.host import Interrupted
from ltx2_engine.ltx2_core.media import MediaError
from PIL import Image, ImageCms


def ramp(frames=10, height=32, width=48):
    x = torch.linspace(0, 1, width).view(1, 1, width, 1).expand(frames, height, width, 1)
    t = torch.linspace(0, 1, frames).view(frames, 1, 1, 1).expand_as(x)
    return torch.cat([x, t, 1 - x], dim=-1)


def tone(seconds, rate, channels=1, hertz=1000.0):
    wave = 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * rate)) / rate)
    return {"waveform": wave.expand(1, channels, -1), "sample_rate": rate}


def decode_audio(path):
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        frames = [frame.to_ndarray() for frame in container.decode(stream)]
        return np.concatenate(frames, axis=1), stream.codec_context.sample_rate


def loudest_hertz(samples, rate):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * rate / len(samples)


@pytest.mark.parametrize(("fps", "rate"), [(24, 24), (23.976, Fraction(2997, 125)), (29.97, Fraction(2997, 100))])
def test_video_has_the_frames_rate_codec_and_pictures(tmp_path, fps, rate):
    path = tmp_path / "a.mp4"
    frames = ramp()
    media.write_video(path, frames, fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == rate
        assert not container.streams.audio
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == len(frames)
    error = np.abs(np.stack(decoded) / 255 - frames.numpy()).mean()
    assert error < 0.015  # the wrong colour matrix alone would cost more, see below


def test_colours_are_bt709_and_say_so(tmp_path):
    path = tmp_path / "a.mp4"
    media.write_video(path, torch.tensor([0.1, 0.8, 0.2]).expand(3, 64, 64, 3), 24)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    luma, cb, cr = (int(plane[20, 20]) for plane in (frame.to_ndarray()[:64], *chroma(frame)))
    kr, kb = 0.2126, 0.0722
    y = kr * 0.1 + (1 - kr - kb) * 0.8 + kb * 0.2
    assert luma == pytest.approx(16 + 219 * y, abs=2)
    assert cb == pytest.approx(128 + 224 * (0.2 - y) / (2 * (1 - kb)), abs=2)
    assert cr == pytest.approx(128 + 224 * (0.1 - y) / (2 * (1 - kr)), abs=2)
    assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)


def chroma(frame):
    planes = frame.to_ndarray()[frame.height :].reshape(2, frame.height // 2, frame.width // 2)
    return planes[0], planes[1]


def test_index_starts_the_file_so_that_players_start_at_once(tmp_path):
    path = tmp_path / "a.mp4"
    media.write_video(path, ramp(), 24, tone(1, 48000))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_odd_sizes_repeat_the_last_pixel(tmp_path):
    path = tmp_path / "a.mp4"
    media.write_video(path, ramp(3, 33, 47), 24)
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in decoded] == [(34, 48, 3)] * 3
    assert np.abs(decoded[0][:33, :47] / 255 - ramp(3, 33, 47)[0].numpy()).mean() < 0.02


@pytest.mark.parametrize("rate", [24000, 48000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("seconds", [0.4, 2.0, 3.5])
def test_sound_is_fitted_to_the_pictures_and_a_tone_survives(tmp_path, rate, channels, seconds):
    path = tmp_path / "a.mp4"
    media.write_video(path, ramp(48), 24, tone(seconds, rate, channels))
    samples, got_rate = decode_audio(path)
    assert got_rate == rate
    assert samples.shape[0] == channels
    assert abs(samples.shape[1] - 2 * rate) <= 1024
    heard = samples[0, rate // 20 : round(min(seconds, 2.0) * rate) - rate // 20]
    assert loudest_hertz(heard, rate) == pytest.approx(1000, abs=5)
    assert np.sqrt((heard**2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)
    if seconds < 2:
        assert np.abs(samples[0, round((seconds + 0.1) * rate) :]).max() < 0.01
    with av.open(str(path)) as container:
        assert container.duration / av.time_base == pytest.approx(2.0, abs=1024 / rate + 1e-3)


def test_a_rate_that_aac_lacks_is_resampled(tmp_path):
    path = tmp_path / "a.mp4"
    media.write_video(path, ramp(24), 24, tone(1, 20000))
    samples, rate = decode_audio(path)
    assert rate == media.AAC_FALLBACK_RATE
    assert loudest_hertz(samples[0, 2000:-2000], rate) == pytest.approx(1000, abs=5)


def test_sound_and_pictures_interleave(tmp_path):
    path = tmp_path / "a.mp4"
    media.write_video(path, torch.rand(72, 64, 64, 3), 3, tone(24, 24000))  # longer than the muxer waits
    with av.open(str(path)) as container:
        # file offset, because the demuxer sorts by time; plain values, because packets die with the container
        places = sorted((packet.pos, packet.stream.type) for packet in container.demux() if packet.size)
    kinds = [kind for _, kind in places]
    half = kinds[: len(kinds) // 2]
    assert 0.3 < half.count("audio") / kinds.count("audio") < 0.7


def test_prompt_and_workflow_are_embedded(tmp_path):
    path = tmp_path / "a.mp4"
    metadata = {"prompt": {"1": {"class_type": "X", "inputs": {"text": "Grüße"}}}, "workflow": {"nodes": []}}
    media.write_video(path, ramp(2), 24, metadata=metadata)
    with av.open(str(path)) as container:
        assert {key: json.loads(container.metadata[key]) for key in metadata} == metadata


@pytest.mark.parametrize("error", [Interrupted("stop"), ValueError("broken"), KeyboardInterrupt()])
def test_an_interrupt_leaves_no_file_and_keeps_the_old_one(tmp_path, error):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    seen = []

    def stop(count):
        seen.append(count)
        if count == 3:
            raise error

    with pytest.raises(type(error)):
        media.write_video(path, ramp(), 24, tone(1, 48000), on_frame=stop)
    assert seen == [1, 2, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("frames", "fps", "audio", "message"),
    [
        (torch.zeros(0, 8, 8, 3), 24, None, "frames"),
        (torch.zeros(2, 8, 8, 4), 24, None, r"\(2, 8, 8, 4\)"),
        (torch.zeros(2, 8, 8, 3), float("nan"), None, "frame rate"),
        (torch.zeros(2, 8, 8, 3), 0, None, "frame rate"),
        (torch.zeros(2, 8, 8, 3), 24, {"waveform": torch.zeros(2, 1, 9), "sample_rate": 48000}, "track"),
        (torch.zeros(2, 8, 8, 3), 24, {"waveform": torch.zeros(1, 6, 9), "sample_rate": 48000}, "track"),
        (torch.zeros(2, 8, 8, 3), 24, {"waveform": torch.zeros(1, 1, 9), "sample_rate": 0}, "sample rate"),
        (torch.zeros(2, 8, 8, 3), 24, {"waveform": torch.full((1, 1, 9), torch.nan), "sample_rate": 48000}, "finite"),
    ],
)
def test_what_cannot_be_a_video_is_refused(tmp_path, frames, fps, audio, message):
    with pytest.raises(MediaError, match=message):
        media.write_video(tmp_path / "a.mp4", frames, fps, audio)
    assert not list(tmp_path.iterdir())


def test_read_video_gives_pictures_rate_and_sound(tmp_path):
    path = tmp_path / "a.mp4"
    media.write_video(path, ramp(24), 12, tone(2, 24000, 2))
    clip = media.read_video(path)
    assert (clip.get_frame_count(), clip.get_dimensions(), clip.get_frame_rate()) == (24, (48, 32), 12)
    assert clip.get_duration() == 2
    assert clip.audio["sample_rate"] == 24000
    assert clip.audio["waveform"].shape[:2] == (1, 2)
    assert (clip.images - ramp(24)).abs().mean() < 0.015


def test_a_video_above_the_bound_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    media.write_video(path, ramp(10), 24)
    monkeypatch.setattr(media, "MAX_VIDEO_PIXELS", 5 * 32 * 48)
    with pytest.raises(MediaError, match="too long: after 6 frames"):
        media.read_video(path)


def test_play_lists_and_other_texts_are_not_followed(tmp_path):
    media.write_audio(tmp_path / "secret.wav", tone(1, 8000))
    path = tmp_path / "list.m3u8"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.wav\n#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError, match=r"list\.m3u8 is not readable"):
        media.read_audio(path)
    (tmp_path / "script.wav").write_text("ffconcat version 1.0\nfile secret.wav\n")
    with pytest.raises(MediaError, match=r"script\.wav is not readable"):
        media.read_audio(tmp_path / "script.wav")
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(MediaError, match="not readable"):
        media.read_video(tmp_path / "text.mp4")


@pytest.mark.parametrize("suffix", [".flac", ".wav"])
@pytest.mark.parametrize("channels", [1, 2])
def test_written_sound_is_read_back_to_16_bits(tmp_path, suffix, channels):
    generator = torch.Generator().manual_seed(0)
    waveform = torch.rand(1, channels, 5000, generator=generator) * 2 - 1
    media.write_audio(tmp_path / f"a{suffix}", {"waveform": waveform, "sample_rate": 24000})
    back = media.read_audio(tmp_path / f"a{suffix}")
    assert back["sample_rate"] == 24000
    assert back["waveform"].shape == waveform.shape
    assert (back["waveform"] - waveform).abs().max() < 1.6 / 32767


def test_sound_is_not_written_as_anything_else(tmp_path):
    with pytest.raises(MediaError, match=r"\.flac or \.wav, not as '\.exe'"):
        media.write_audio(tmp_path / "a.exe", tone(1, 8000))


def test_image_round_trip_and_metadata(tmp_path):
    picture = torch.arange(256).view(16, 16, 1).expand(16, 16, 3) / 255
    media.write_image(tmp_path / "a.png", picture, {"prompt": {"a": 1}})
    assert torch.equal(media.read_image(tmp_path / "a.png"), picture)
    assert json.loads(Image.open(tmp_path / "a.png").text["prompt"]) == {"a": 1}


def test_image_is_turned_upright(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned left in the file: show it rotated by 90 degrees to the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = media.read_image(tmp_path / "a.png")
    assert image.shape == (8, 4, 3)
    assert image[0, 3].tolist() == [1, 1, 1]


def test_alpha_comes_apart_and_colours_stay(tmp_path):
    pixels = np.full((4, 4, 4), 200, np.uint8)
    pixels[..., 3] = 51
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    image, alpha = media.read_image_and_alpha(tmp_path / "a.png")
    assert image.unique().tolist() == pytest.approx([200 / 255])
    assert alpha.unique().tolist() == pytest.approx([0.2])
    Image.fromarray(pixels[..., :3]).save(tmp_path / "b.png")
    assert media.read_image_and_alpha(tmp_path / "b.png")[1] is None


def test_palette_and_deep_grey_pictures_are_read(tmp_path):
    Image.fromarray(np.full((4, 4, 3), (255, 0, 0), np.uint8)).convert("P").save(tmp_path / "p.png")
    assert media.read_image(tmp_path / "p.png")[0, 0].tolist() == [1, 0, 0]
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "g.png")
    assert media.read_image(tmp_path / "g.png")[0, 0].tolist() == pytest.approx([128 / 255] * 3)


def test_an_embedded_profile_is_applied(tmp_path):
    pixels = Image.fromarray(np.full((4, 4, 3), 128, np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels.save(tmp_path / "srgb.png", icc_profile=srgb)
    assert media.read_image(tmp_path / "srgb.png")[0, 0].tolist() == pytest.approx([128 / 255] * 3, abs=1.5 / 255)

    exponent = srgb.index(b"para") + 12  # ((x + 0.055) / 1.055) ** exponent, here 1 instead of 2.4
    pixels.save(tmp_path / "linear.png", icc_profile=srgb[:exponent] + b"\0\1\0\0" + srgb[exponent + 4 :])
    light = (128 / 255 + 0.055) / 1.055
    encoded = 1.055 * light ** (1 / 2.4) - 0.055
    assert media.read_image(tmp_path / "linear.png")[0, 0].tolist() == pytest.approx([encoded] * 3, abs=1.5 / 255)

    pixels.save(tmp_path / "broken.png", icc_profile=b"not a profile")
    assert media.read_image(tmp_path / "broken.png")[0, 0].tolist() == pytest.approx([128 / 255] * 3)


def test_unreadable_and_oversized_pictures_say_why(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(MediaError, match=r"a\.png is not a readable picture"):
        media.read_image(tmp_path / "a.png")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:2000])
    with pytest.raises(MediaError, match=r"cut\.png is not a readable picture"):
        media.read_image(tmp_path / "cut.png")
    (tmp_path / "big.png").write_bytes(whole.getvalue())
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 63)
    with pytest.raises(MediaError, match="64 x 64 pixels"):
        media.read_image(tmp_path / "big.png")


def test_recompression_follows_the_factor():
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    error = [np.abs(media.recompress_image(picture, crf).astype(int) - picture).mean() for crf in (0, 18, 33, 51)]
    assert error[0] == 0
    assert error[0] < error[1] < error[2] < error[3]
    grey = np.full((32, 32, 3), 100, np.uint8)
    assert np.abs(media.recompress_image(grey, 33).astype(int) - 100).max() <= 2


def test_recompression_crops_to_even_and_leaves_slivers_alone():
    picture = np.random.default_rng(0).integers(0, 256, (35, 47, 3), np.uint8)
    assert np.array_equal(media.recompress_image(picture, 20), media.recompress_image(picture[:34, :46], 20))
    assert media.recompress_image(picture, 20).shape == (34, 46, 3)
    assert media.recompress_image(picture[:1], 33) is not None
    assert np.array_equal(media.recompress_image(picture[:1], 33), picture[:1])
    with pytest.raises(MediaError, match="between 0 and 51, found 52"):
        media.recompress_image(picture, 52)


def test_contact_sheet_shows_evenly_spaced_frames(tmp_path):
    frames = (torch.arange(33) / 32).view(33, 1, 1, 1).expand(33, 20, 30, 3)
    media.write_contact_sheet(tmp_path / "s.png", frames, columns=4, title="ramp")
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (24 + 4 * 20, 4 * 30, 3)
    shown = [int(sheet[24 + 20 * row + 10, 30 * column + 15, 0]) for row in range(4) for column in range(4)]
    want = torch.linspace(0, 32, 16).round() / 32 * 255
    assert shown == pytest.approx(want.tolist(), abs=0.6)
    media.write_contact_sheet(tmp_path / "one.png", frames[:1], columns=4)
    assert Image.open(tmp_path / "one.png").size == (30, 20)
