"""Pictures, sound and video on disk: reading, writing, and the recompression that image conditioning needs.

Pictures are float tensors in 0..1 with channels last; sound is ``{"waveform": [1, C, S], "sample_rate": int}``.
Every writer fills a temporary file beside the target and renames it, so a failed or interrupted run leaves nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import av
    import numpy as np
    import PIL.Image
    from torch import Tensor

    Audio = dict[str, Any]

MAX_PIXELS = 2**26  # of one picture: 8192 x 8192
MAX_VIDEO_PIXELS = 2**31  # of all frames together: 1035 frames of 1920 x 1080
MAX_SAMPLES = 2**28  # of all channels together: 46 minutes of 48 kHz stereo
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
AAC_FALLBACK_RATE = 48000
# Play lists and concat scripts are left out: they make the demuxer open other files.
CONTAINERS = "mov,matroska,avi,wav,mp3,flac,ogg,aac,mpegts,mpeg,aiff"


class MediaError(ValueError):
    """A file that is not a readable picture, sound or video, or a value that cannot be written as one."""


@dataclass(frozen=True)
class VideoClip:
    """A ``VIDEO`` value without ComfyUI, with the part of its interface that the nodes use.

    images: [F, H, W, 3] in 0..1. audio: dict or ``None``.
    """

    images: Tensor
    frame_rate: Fraction
    audio: Audio | None = None

    def get_components(self) -> VideoClip:
        return self

    def get_dimensions(self) -> tuple[int, int]:
        return int(self.images.shape[2]), int(self.images.shape[1])

    def get_frame_count(self) -> int:
        return int(self.images.shape[0])

    def get_frame_rate(self) -> Fraction:
        return self.frame_rate

    def get_duration(self) -> float:
        return float(self.get_frame_count() / self.frame_rate)

    def __repr__(self) -> str:
        width, height = self.get_dimensions()
        sound = "with sound" if self.audio else "silent"
        return (
            f"VideoClip({self.get_frame_count()} frames of {width} x {height} at {float(self.frame_rate):g}/s, {sound})"
        )


# Pictures -----------------------------------------------------------------------------------------------------------


def read_image(path: Path) -> Tensor:
    """The picture as [H, W, 3] float32 in 0..1: upright by EXIF, in sRGB, transparency ignored."""
    return read_image_and_alpha(path)[0]


def read_image_and_alpha(path: Path) -> tuple[Tensor, Tensor | None]:
    """``read_image`` and the opacity [H, W] in 0..1, ``None`` for a picture without one.

    Colours are not multiplied by the opacity. Raises ``MediaError`` when unreadable or above ``MAX_PIXELS``.
    """
    import numpy as np
    import torch

    image = _open_image(path)
    alpha = None
    if "A" in image.getbands() or "transparency" in image.info:
        alpha = torch.from_numpy(np.asarray(image.convert("RGBA").getchannel("A"), np.float32) / 255)
    rgb = np.asarray(_to_srgb(image), np.float32) / 255
    return torch.from_numpy(rgb), alpha


def _open_image(path: Path) -> PIL.Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise MediaError(f"{path.name} has {width} x {height} pixels; at most {MAX_PIXELS} are read")
            image.load()
            return ImageOps.exif_transpose(image) or image
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path.name} is too large: {error}; at most {MAX_PIXELS} pixels are read") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise MediaError(f"{path.name} is not a readable picture ({error}); use PNG, JPEG or WebP") from error


def _to_srgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """8-bit sRGB. An embedded profile is applied; 16-bit grey keeps its high byte, rounded."""
    import numpy as np
    from PIL import Image, ImageCms

    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image, np.float32) / (257 if image.mode.startswith("I") else 1 / 255)
        return Image.fromarray(np.clip(grey + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    profile = image.info.get("icc_profile")
    plain = image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken profile is as good as none
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            plain = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB") or plain
    return plain.convert("RGB")


def write_image(path: Path, image: Tensor, metadata: Mapping[str, Any] | None = None) -> None:
    """[H, W, 3 or 4] in 0..1 as PNG; ``metadata`` becomes one text entry of JSON a key, as ComfyUI reads them."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for key, value in (metadata or {}).items():
        texts.add_text(key, json.dumps(value))
    with _replacing(path) as part:
        Image.fromarray(_bytes(image)).save(part, format="PNG", pnginfo=texts, compress_level=4)


def write_contact_sheet(path: Path, frames: Tensor, columns: int = 4, title: str = "") -> None:
    """At most four rows of evenly spaced frames of [F, H, W, 3] in 0..1, each up to 320 wide, as one PNG."""
    import torch
    from PIL import Image, ImageDraw

    count = min(len(frames), 4 * columns)
    if count < 1 or columns < 1:
        raise MediaError(f"a contact sheet needs frames and columns, found {len(frames)} frames, {columns} columns")
    picked = torch.linspace(0, len(frames) - 1, count).round().long().tolist()
    height, width = frames.shape[1:3]
    scale = min(1.0, 320 / width)
    cell = (max(round(width * scale), 1), max(round(height * scale), 1))
    top = 24 if title else 0
    sheet = Image.new("RGB", (min(columns, count) * cell[0], top + math.ceil(count / columns) * cell[1]))
    ImageDraw.Draw(sheet).text((6, 6), title, fill="white")
    for place, index in enumerate(picked):
        row, column = divmod(place, columns)
        thumbnail = Image.fromarray(_bytes(frames[index])).resize(cell)
        sheet.paste(thumbnail, (column * cell[0], top + row * cell[1]))
    with _replacing(path) as part:
        sheet.save(part, format="PNG")


def recompress_image(rgb: np.ndarray, crf: int) -> np.ndarray:
    """One frame of H.264 at constant rate factor ``crf`` and back, on [H, W, 3] uint8; odd edges lose one pixel.

    The model was trained on compressed frames: a pristine still would freeze the video. ``crf`` 0 and pictures with
    an edge below 2 pass unchanged.
    """
    import av
    import numpy as np

    if not 0 <= crf <= 51:
        raise MediaError(f"crf must be between 0 and 51, found {crf}")
    height, width = rgb.shape[:2]
    if crf == 0 or min(height, width) < 2:
        return rgb
    even = np.ascontiguousarray(rgb[: height // 2 * 2, : width // 2 * 2])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = even.shape[1], even.shape[0], "yuv420p"
        frame = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(format="yuv420p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


# Video --------------------------------------------------------------------------------------------------------------


def write_video(
    path: Path,
    frames: Tensor,
    fps: float,
    audio: Audio | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> None:
    """[F, H, W, 3] in 0..1 and sound as mp4: H.264 (yuv420p, BT.709, crf 19) and AAC.

    fps: rounded to 1/1000. Sound is cut, or padded with silence, to the duration of the pictures. An odd edge is
    extended by repeating its last pixel, because yuv420p needs even sizes. ``metadata`` is embedded as JSON, one tag
    a key. ``on_frame`` gets the number of frames written; whatever it raises ends the writing and removes the file.
    """
    import av

    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise MediaError(f"a video needs frames [F, H, W, 3], found {tuple(frames.shape)}")
    rate = frame_rate(fps)
    duration = Fraction(len(frames)) / rate
    options = {"movflags": "use_metadata_tags+faststart"}
    with _replacing(path) as part, av.open(str(part), "w", format="mp4", options=options) as container:
        for key, value in (metadata or {}).items():
            container.metadata[key] = json.dumps(value)
        video = _video_stream(container, rate, frames.shape[2], frames.shape[1])
        sound = None if audio is None else _SoundTrack(container, audio, duration)
        for index, frame in enumerate(frames):
            container.mux(video.encode(_video_frame(frame, index)))
            if sound is not None:
                sound.write_until(Fraction(index + 1) / rate)
            if on_frame is not None:
                on_frame(index + 1)
        container.mux(video.encode())
        if sound is not None:
            sound.close()


def frame_rate(fps: float) -> Fraction:
    """``fps`` as a fraction of thousandths; between 0.1 and 1000 frames a second."""
    if not math.isfinite(fps) or not 0.1 <= fps <= 1000:
        raise MediaError(f"frame rate must be between 0.1 and 1000, found {fps}")
    return Fraction(round(Fraction(fps) * 1000), 1000)


def _video_stream(container: av.container.OutputContainer, rate: Fraction, width: int, height: int) -> Any:
    from av.video.reformatter import ColorRange, Colorspace

    stream = container.add_stream("libx264", rate=rate, options={"crf": "19", "preset": "medium"})
    stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
    context = stream.codec_context
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries = context.color_trc = 1  # BT.709
    return stream


def _video_frame(frame: Tensor, index: int) -> av.VideoFrame:
    import av
    import numpy as np
    from av.video.reformatter import ColorRange, Colorspace

    rgb = _bytes(frame)
    height, width = rgb.shape[:2]
    rgb = np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    picture = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )
    picture.pts = index
    return picture


class _SoundTrack:
    """The AAC stream of a container, written in step with the pictures so that both interleave."""

    def __init__(self, container: av.container.OutputContainer, audio: Audio, duration: Fraction):
        samples, rate = _fitted(audio, duration), int(audio["sample_rate"])
        self._container, self._samples, self._rate, self._written = container, samples, rate, 0
        self._layout = "mono" if len(samples) == 1 else "stereo"
        coded_rate = rate if rate in AAC_RATES else AAC_FALLBACK_RATE
        self._stream = container.add_stream("aac", rate=coded_rate, layout=self._layout)
        self._stream.codec_context.bit_rate = 128_000 * len(samples)

    def write_until(self, seconds: Fraction) -> None:
        import numpy as np

        end = min(round(seconds * self._rate), self._samples.shape[1])
        if end > self._written:
            chunk = np.ascontiguousarray(self._samples[:, self._written : end])
            frame = _audio_frame(chunk, self._rate, self._layout, self._written)
            self._container.mux(self._stream.encode(frame))
            self._written = end

    def close(self) -> None:
        self._container.mux(self._stream.encode())


def _fitted(audio: Audio, seconds: Fraction) -> np.ndarray:
    """The sound as [C, S] with exactly the samples of ``seconds``."""
    import numpy as np

    samples = _samples(audio)
    wanted = round(seconds * int(audio["sample_rate"]))
    return np.pad(samples[:, :wanted], ((0, 0), (0, max(wanted - samples.shape[1], 0))))


def read_video(path: Path) -> VideoClip:
    """The whole video, decoded. Raises ``MediaError`` when unreadable or above ``MAX_VIDEO_PIXELS``."""
    import torch

    frames: list[Tensor] = []
    with _opened(path) as container:
        if not container.streams.video:
            raise MediaError(f"{path.name} holds no pictures")
        stream = container.streams.video[0]
        if stream.width * stream.height > MAX_PIXELS:
            raise MediaError(f"{path.name} has {stream.width} x {stream.height} pixels; at most {MAX_PIXELS} are read")
        rate = Fraction(stream.average_rate or stream.guessed_rate or 24)
        for frame in container.decode(stream):
            # float pictures as in ComfyUI: 8 bits would round what the colour conversion gives
            frames.append(torch.from_numpy(frame.to_ndarray(format="gbrpf32le")))
            if len(frames) * frames[0].shape[0] * frames[0].shape[1] > MAX_VIDEO_PIXELS:
                raise MediaError(
                    f"{path.name} is too long: after {len(frames)} frames of {stream.width} x {stream.height} it has "
                    f"more than {MAX_VIDEO_PIXELS} pixels; cut it or make it smaller"
                )
        sounds = bool(container.streams.audio)
    if not frames:
        raise MediaError(f"{path.name} holds no frame that could be decoded")
    return VideoClip(torch.stack(frames), rate, read_audio(path) if sounds else None)


# Sound --------------------------------------------------------------------------------------------------------------


def read_audio(path: Path) -> Audio:
    """The first sound track as ``{"waveform": [1, C, S] float32, "sample_rate"}``, C as in the file."""
    import av
    import numpy as np
    import torch

    pieces: list[np.ndarray] = []
    total = 0
    with _opened(path) as container:
        if not container.streams.audio:
            raise MediaError(f"{path.name} holds no sound")
        stream = container.streams.audio[0]
        rate = int(stream.codec_context.sample_rate)
        resampler = av.AudioResampler(format="fltp")
        for frame in container.decode(stream):
            for piece in resampler.resample(frame):
                pieces.append(piece.to_ndarray())
                total += pieces[-1].size
            if total > MAX_SAMPLES:
                raise MediaError(f"{path.name} has more than {MAX_SAMPLES} samples; cut it")
    if not pieces:
        raise MediaError(f"{path.name} holds no sound that could be decoded")
    return {"waveform": torch.from_numpy(np.concatenate(pieces, axis=1))[None], "sample_rate": rate}


def write_audio(path: Path, audio: Audio, metadata: Mapping[str, Any] | None = None) -> None:
    """Mono or stereo sound as 16-bit ``.flac`` or ``.wav``."""
    import av
    import numpy as np

    codecs = {".flac": ("flac", "flac"), ".wav": ("wav", "pcm_s16le")}
    if path.suffix not in codecs:
        raise MediaError(f"sound is written as {' or '.join(codecs)}, not as {path.suffix!r}")
    container_format, codec = codecs[path.suffix]
    samples = _samples(audio)
    rate, layout = int(audio["sample_rate"]), "mono" if len(samples) == 1 else "stereo"
    pcm = np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16).T.reshape(1, -1)
    with _replacing(path) as part, av.open(str(part), "w", format=container_format) as container:
        for key, value in (metadata or {}).items():
            container.metadata[key] = json.dumps(value)
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.codec_context.format = "s16"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm), format="s16", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _samples(audio: Audio) -> np.ndarray:
    """The waveform as [C, S] float32, checked."""
    import numpy as np

    waveform, rate = audio["waveform"], int(audio["sample_rate"])
    if waveform.ndim != 3 or waveform.shape[0] != 1 or waveform.shape[1] not in (1, 2):
        raise MediaError(f"sound must be one mono or stereo track [1, 1 or 2, samples], found {tuple(waveform.shape)}")
    if not 1000 <= rate <= 384_000:
        raise MediaError(f"sample rate must be between 1000 and 384000, found {rate}")
    samples = waveform[0].detach().float().cpu().numpy()
    if not np.isfinite(samples).all():
        raise MediaError("sound holds values that are not finite")
    return samples


def _audio_frame(samples: np.ndarray, rate: int, layout: str, start: int) -> av.AudioFrame:
    import av

    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
    frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), start
    return frame


# Files --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    """The file opened by one of the ``CONTAINERS``; library errors become ``MediaError``."""
    import av

    try:
        with av.open(str(path), options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}) as container:
            yield container
    except av.FFmpegError as error:
        raise MediaError(f"{path.name} is not readable as sound or video ({error})") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` at the end, or is removed."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _bytes(image: Tensor) -> np.ndarray:
    """0..1 to uint8, rounded to nearest; NaN becomes 0."""
    import numpy as np

    pixels = image.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().cpu().numpy()
    return np.ascontiguousarray(pixels.astype(np.uint8))
