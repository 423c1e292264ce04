"""The files of a text encoder, in every form that users have them: which weights, which configuration, which tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from ..loading.checkpoint import GGUF_SUFFIX, Checkpoint, read_header
from ..loading.weights import Weight, weights_of
from . import encoder_config, gemma
from .encoder_config import WHAT_FITS, Config, GemmaError
from .encoder_names import module_name
from .tokenizer import TokenizerSource, tokenizer_in_folder, tokenizer_of_file

FOLDER, SINGLE_FILE, GGUF, BUNDLE = "folder", "single file", "gguf", "bundle"

_CONFIG_KEY = "gemma_config"
_PROJECTION = "text_embedding_projection."
_VISION = ("vision_model.", "vision_tower.", "model.vision_tower.", "multi_modal_projector.", "audio_projector.")
# tensors of a layer that tell Gemma 3 from other language models, and Gemma 4 from Gemma 3
_GEMMA_MARK, _GEMMA4_MARK = "layers.0.pre_feedforward_layernorm.weight", "layers.0.layer_scalar"
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class TextEncoderFiles:
    """What the headers of a text encoder's files say; no weights.

    kind: ``FOLDER`` (Hugging Face), ``SINGLE_FILE`` (for ComfyUI), ``GGUF``, or ``BUNDLE`` (of LTX-2.5, with the text
    projection inside). config: as Hugging Face writes it. weights: the files; names: for each of them, checkpoint name
    of what is loaded -> name in the module. version: "gemma3", or what a fine-tuned encoder calls itself.
    """

    path: Path
    kind: str
    config: Config
    weights: tuple[Checkpoint, ...]
    names: tuple[Mapping[str, str], ...]
    tokenizer: TokenizerSource

    @property
    def version(self) -> str:
        return encoder_config.version_label(self.config)

    @property
    def num_hidden_states(self) -> int:
        """How many states the encoder yields: the embeddings and every layer's output."""
        return encoder_config.num_hidden_states(self.config)

    @property
    def width(self) -> int:
        """The width of a hidden state."""
        return encoder_config.width(self.config)

    @property
    def projection(self) -> Checkpoint | None:
        """The file that also holds LTX's text projection; None where it is elsewhere."""
        return next((file for file in self.weights if any(map(_is_projection, file.tensors))), None)

    @cached_property
    def elements(self) -> int:
        """Weights of the module."""
        return sum(math.prod(weight.shape) for _, weight, _ in self.needed())

    def needed(self) -> Iterator[tuple[Checkpoint, Weight, str]]:
        """Everything that fills the module: the file, the weight, its name in the module; in the order of the files."""
        for file, names in zip(self.weights, self.names, strict=True):
            found = weights_of(file)
            for checkpoint_name, name in names.items():
                yield file, found[checkpoint_name], name


def read_text_encoder(path: Path) -> TextEncoderFiles:
    """Read the headers of a Hugging Face folder, a safetensors file or a GGUF file, and check every tensor's shape.

    Raises GemmaError, CheckpointError, ConfigError or TokenizerError; each names the file, what it is and what fits.
    """
    files = _read_folder(path) if path.is_dir() else _read_file(path)
    _check(files)
    return files


def build(files: TextEncoderFiles) -> nn.Module:
    """The module that the files fill; under ``torch.device("meta")`` it takes no memory. Raises GemmaError."""
    return gemma.build_gemma(files.config)


# the forms ------------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> TextEncoderFiles:
    path = folder / "config.json"
    if not path.is_file():
        raise GemmaError(f"{folder} has no config.json. {WHAT_FITS}")
    config = encoder_config.read_config(path)
    weights = tuple(read_header(path) for path in _weight_files(folder))
    names = tuple(_names(file) for file in weights)
    return TextEncoderFiles(folder, FOLDER, config, weights, names, tokenizer_in_folder(folder))


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the shards that an index lists, else every file beside ``config.json``.

    Raises GemmaError when there are none, and for an index that lists missing files or files elsewhere.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _indexed_files(folder, indices[0])
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        raise GemmaError(f"{folder} has no .safetensors file; choose a folder with some, or a single .gguf file itself")
    return files


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    weight_map = encoder_config.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GemmaError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    odd = [name for name in names if Path(name).name != name or "\\" in name or not name.endswith(".safetensors")]
    if odd:
        raise GemmaError(f"{index} lists {odd[0]!r}; only .safetensors files of the same folder are read")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise GemmaError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists; download it again")
    return [folder / name for name in names]


def _read_file(path: Path) -> TextEncoderFiles:
    file = read_header(path)
    names = _names(file)
    if not names:
        raise GemmaError(f"{path}: this is {_looks_like(file)}, not a text encoder. {WHAT_FITS}")
    kind, config = _file_config(file, names)
    return TextEncoderFiles(path, kind, config, (file,), (names,), tokenizer_of_file(file))


def _file_config(file: Checkpoint, names: Mapping[str, str]) -> tuple[str, Config]:
    """The kind of a file that is no folder, and its configuration: its own, or that of the Gemma 3 that it holds."""
    text = file.metadata.get(_CONFIG_KEY)
    if text is not None:
        return BUNDLE, encoder_config.parse_config(text, f"{file.path}, {_CONFIG_KEY}")
    shapes = {name: weights_of(file)[checkpoint_name].shape for checkpoint_name, name in names.items()}
    if _GEMMA4_MARK in shapes:
        raise GemmaError(
            f"{file.path}: this is a Gemma 4 text encoder without the {_CONFIG_KEY} in its metadata, by which LTX-2.5's "
            f"is told from others; use the file as it was released. {WHAT_FITS}"
        )
    if _GEMMA_MARK not in shapes:
        raise GemmaError(f"{file.path}: this is a language model, but not Gemma 3. {WHAT_FITS}")
    kind = GGUF if file.path.suffix.lower() == GGUF_SUFFIX else SINGLE_FILE
    return kind, encoder_config.gemma3_config(shapes, str(file.path))


def _names(file: Checkpoint) -> dict[str, str]:
    return {name: ours for name in weights_of(file) if (ours := module_name(name)) is not None}


def _looks_like(file: Checkpoint) -> str:
    if any(name.startswith(_VISION) for name in file.tensors):
        return "the vision part of a text encoder, without its language model"
    return file.looks_like()


def _is_projection(name: str) -> bool:
    return name.startswith(_PROJECTION)


# the check ------------------------------------------------------------------------------------------------------------


def _check(files: TextEncoderFiles) -> None:
    """Raise GemmaError unless the files hold every tensor of the module once, in its shape, and no other."""
    needed = encoder_config.tensor_shapes(files.config)
    found: dict[str, tuple[int, ...]] = {}
    wrong = []
    for file, weight, name in files.needed():
        if name in found:
            wrong.append(f"{weight.name} of {file.path.name} is there more than once")
        elif name not in needed:
            wrong.append(f"{weight.name} of shape {list(weight.shape)} is unexpected")
        elif weight.shape != needed[name]:
            wrong.append(f"{weight.name} is {list(weight.shape)}, needs {list(needed[name])}")
        elif weight.format == "plain" and not weight.parts["data"].dtype.startswith(("F", "BF")):
            wrong.append(f"{weight.name} is {weight.parts['data'].dtype}, needs floating-point numbers")
        found[name] = weight.shape
    wrong += [f"{name} {list(shape)} is missing" for name, shape in needed.items() if name not in found]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise GemmaError(
            f"{files.path} does not hold the weights of a {files.version} text encoder of {files.num_hidden_states - 1} "
            f"layers of width {files.width}: {'; '.join(wrong[:_SHOWN])}{more}. {WHAT_FITS}"
        )
