"""ComfyUI's own nodes that workflows of this pack use, with the same ids, the used inputs, and the same payloads."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from typing import Any, cast

from ...ltx2_core.host import host
from ...ltx2_core.paths import PathError
from ...ltx2_core.standalone import StandaloneHost
from ..fields import BOOL, COMBO, FLOAT, INT, LINK, STRING

PREFIX_TIP = "Where to save below the output folder; a counter is appended."
VALUE_TIP = "The constant."


def _check_input(name: str) -> bool | str:
    try:
        host().input_path(name)
    except PathError as error:
        return str(error)
    return True


def _input_files() -> list[str]:
    """What the input folder offers. Only the standalone host is asked: in ComfyUI its own nodes run."""
    return cast(StandaloneHost, host()).list_inputs()


class LoadImage:
    """A picture of the input folder."""

    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": COMBO(_input_files(), "Picture of the input folder.")}}

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool | str:
        return _check_input(image)

    @classmethod
    def execute(cls, image: str) -> tuple[Any, Any]:
        import torch

        from ...ltx2_core.media import read_image_and_alpha

        picture, alpha = read_image_and_alpha(host().input_path(image))
        mask = torch.zeros(64, 64) if alpha is None else 1 - alpha
        return picture[None], mask[None]


class LoadAudio:
    """A sound of the input folder."""

    RETURN_TYPES = ("AUDIO",)
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"audio": COMBO(_input_files(), "Sound of the input folder.")}}

    @classmethod
    def VALIDATE_INPUTS(cls, audio: str) -> bool | str:
        return _check_input(audio)

    @classmethod
    def execute(cls, audio: str) -> tuple[Any]:
        from ...ltx2_core.media import read_audio

        return (read_audio(host().input_path(audio)),)


class LoadVideo:
    """A video of the input folder."""

    RETURN_TYPES = ("VIDEO",)
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": COMBO(_input_files(), "Video of the input folder.")}}

    @classmethod
    def VALIDATE_INPUTS(cls, file: str) -> bool | str:
        return _check_input(file)

    @classmethod
    def execute(cls, file: str) -> tuple[Any]:
        from ...ltx2_core.media import read_video

        return (read_video(host().input_path(file)),)


class SaveImage:
    """Pictures as PNG files."""

    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "execute"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": LINK("IMAGE", "Pictures to save."),
                "filename_prefix": STRING("ComfyUI", PREFIX_TIP),
            }
        }

    @classmethod
    def execute(cls, images: Any, filename_prefix: str = "ComfyUI") -> dict[str, Any]:
        from ...ltx2_core.media import write_image

        saved = []
        with host().progress(len(images), "Save images") as progress:
            for image in images:
                file = host().save_path(filename_prefix, "png", image.shape[1], image.shape[0])
                write_image(file.path, image, host().save_metadata())
                saved.append(file.ui())
                progress.step()
        return {"ui": {"images": saved}, "result": (images,)}


class SaveVideo:
    """A video as mp4 (H.264 and AAC)."""

    RETURN_TYPES = ("VIDEO",)
    RETURN_NAMES = ("video",)
    FUNCTION = "execute"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        codec = COMBO(["auto", "h264"], "Codec of the pictures; both write H.264.")
        return {
            "required": {
                "video": LINK("VIDEO", "Video to save."),
                "filename_prefix": STRING("video/ComfyUI", PREFIX_TIP),
                "format": COMBO(["auto", "mp4"], "Container; both write mp4."),
            },
            "optional": {"codec": codec, "format.codec": codec},
        }

    @classmethod
    def execute(
        cls,
        video: Any,
        filename_prefix: str = "video/ComfyUI",
        format: str = "auto",
        codec: str = "auto",
        **format_options: str,
    ) -> dict[str, Any]:
        import torch

        from ...ltx2_core.media import write_video
        from ...ltx2_core.phases import phase

        clip = video.get_components()
        frames = clip.images[..., :3]
        file = host().save_path(filename_prefix, "mp4", frames.shape[2], frames.shape[1])
        with phase("writing the video", torch.device("cpu")), host().progress(len(frames), "Save video") as progress:
            write_video(
                file.path,
                frames,
                float(clip.frame_rate),
                clip.audio,
                metadata=host().save_metadata(),
                on_frame=progress.to,
            )
        return {"ui": {"images": [file.ui()], "animated": (True,)}, "result": (video,)}


class SaveAudio:
    """Sound as FLAC."""

    RETURN_TYPES = ("AUDIO",)
    RETURN_NAMES = ("audio",)
    FUNCTION = "execute"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "audio": LINK("AUDIO", "Sound to save."),
                "filename_prefix": STRING("audio/ComfyUI", PREFIX_TIP),
            }
        }

    @classmethod
    def execute(cls, audio: Any, filename_prefix: str = "audio/ComfyUI") -> dict[str, Any]:
        from ...ltx2_core.media import write_audio

        file = host().save_path(filename_prefix, "flac")
        write_audio(file.path, audio, host().save_metadata())
        return {"ui": {"audio": [file.ui()]}, "result": (audio,)}


class CreateVideo:
    """Pictures, frame rate and sound joined to a video."""

    RETURN_TYPES = ("VIDEO",)
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": LINK("IMAGE", "Frames of the video."),
                "fps": FLOAT(30.0, 1.0, 120.0, "Frames a second.", step=1.0),
            },
            "optional": {
                "audio": LINK("AUDIO", "Sound of the video."),
                "bit_depth": INT(8, 8, 8, "Bits a colour; this runner writes 8."),
            },
        }

    @classmethod
    def execute(cls, images: Any, fps: float = 30.0, audio: Any = None, bit_depth: int = 8) -> tuple[Any]:
        from ...ltx2_core.media import VideoClip

        return (VideoClip(images, Fraction(fps), audio),)


class GetVideoComponents:
    """A video taken apart."""

    RETURN_TYPES = ("IMAGE", "AUDIO", "FLOAT", "INT")
    RETURN_NAMES = ("images", "audio", "fps", "bit_depth")
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"video": LINK("VIDEO", "Video to take apart.")}}

    @classmethod
    def execute(cls, video: Any) -> tuple[Any, Any, float, int]:
        clip = video.get_components()
        return clip.images, clip.audio, float(clip.frame_rate), 8


class ImageFromBatch:
    """A stretch of a batch of pictures; what lies outside the batch is left out."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": LINK("IMAGE", "Pictures to take from."),
                "batch_index": INT(0, -16384, 16384, "First picture to take; negative counts from the end."),
                "length": INT(1, 1, 4096, "Number of pictures to take."),
            }
        }

    @classmethod
    def execute(cls, image: Any, batch_index: int = 0, length: int = 1) -> tuple[Any]:
        start = min(batch_index, len(image) - 1) if batch_index >= 0 else max(batch_index + len(image), 0)
        return (image[start : start + length].clone(),)


class EmptyImage:
    """Pictures of one colour."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "width": INT(512, 1, 16384, "Width in pixels."),
                "height": INT(512, 1, 16384, "Height in pixels."),
                "batch_size": INT(1, 1, 4096, "Number of pictures."),
                "color": INT(0, 0, 0xFFFFFF, "Colour as 0xRRGGBB.", display="color"),
            }
        }

    @classmethod
    def execute(cls, width: int = 512, height: int = 512, batch_size: int = 1, color: int = 0) -> tuple[Any]:
        import torch

        from ...ltx2_core.media import MAX_VIDEO_PIXELS

        if width * height * batch_size > MAX_VIDEO_PIXELS:
            raise ValueError(f"{batch_size} pictures of {width} x {height} exceed {MAX_VIDEO_PIXELS} pixels in all")
        rgb = torch.tensor([color >> 16 & 255, color >> 8 & 255, color & 255]) / 255
        return (rgb.expand(batch_size, height, width, 3).clone(),)


class PreviewAny:
    """Any value as text."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "execute"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"source": LINK("*", "Value to show.")}}

    @classmethod
    def execute(cls, source: Any = None) -> dict[str, Any]:
        if isinstance(source, str):
            text = source
        else:
            try:
                text = json.dumps(source, indent=4, ensure_ascii=False)
            except (TypeError, ValueError):
                text = str(source)
        return {"ui": {"text": (text,)}, "result": (text,)}


class _Primitive:
    """A constant that several nodes share."""

    FUNCTION = "execute"
    VALUE: tuple[str, dict[str, Any]]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": cls.VALUE}}

    @classmethod
    def execute(cls, value: Any) -> tuple[Any]:
        return (value,)


class PrimitiveInt(_Primitive):
    RETURN_TYPES = ("INT",)
    VALUE = INT(0, -sys.maxsize, sys.maxsize, VALUE_TIP)


class PrimitiveFloat(_Primitive):
    RETURN_TYPES = ("FLOAT",)
    VALUE = FLOAT(0.0, -sys.maxsize, sys.maxsize, VALUE_TIP)


class PrimitiveString(_Primitive):
    RETURN_TYPES = ("STRING",)
    VALUE = STRING("", VALUE_TIP)


class PrimitiveStringMultiline(_Primitive):
    RETURN_TYPES = ("STRING",)
    VALUE = STRING("", VALUE_TIP, multiline=True)


class PrimitiveBoolean(_Primitive):
    RETURN_TYPES = ("BOOLEAN",)
    VALUE = BOOL(False, VALUE_TIP)


CORE_NODES: dict[str, type] = {
    "LoadImage": LoadImage,
    "LoadAudio": LoadAudio,
    "LoadVideo": LoadVideo,
    "SaveImage": SaveImage,
    "SaveVideo": SaveVideo,
    "SaveAudio": SaveAudio,
    "CreateVideo": CreateVideo,
    "GetVideoComponents": GetVideoComponents,
    "ImageFromBatch": ImageFromBatch,
    "EmptyImage": EmptyImage,
    "PreviewAny": PreviewAny,
    "PrimitiveInt": PrimitiveInt,
    "PrimitiveFloat": PrimitiveFloat,
    "PrimitiveString": PrimitiveString,
    "PrimitiveStringMultiline": PrimitiveStringMultiline,
    "PrimitiveBoolean": PrimitiveBoolean,
}
