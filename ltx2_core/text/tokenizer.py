"""Prompts to token ids: where a text encoder's tokenizer lies, and what it makes of a prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..loading.checkpoint import Checkpoint, CheckpointError, read_tensors
from ..loading.gguf import read_arrays
from .sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, Piece, sentencepiece_model

MAX_TOKENS = 1024

JSON, SENTENCEPIECE, GGUF = "tokenizer.json", "tokenizer.model", "GGUF vocabulary"

# Gemma 3's and 4's tokenizer.json have 33 MB, Gemma 3's SentencePiece model 4.7 MB
_MAX_BYTES = {JSON: 128 * 2**20, SENTENCEPIECE: 64 * 2**20}
_BOS = "<bos>"
# tensors of a text encoder file that hold its tokenizer
_TENSORS = {"tokenizer_json": JSON, "spiece_model": SENTENCEPIECE}
# Gemma's spaces, as its vocabulary spells them
_SPACE = "\u2581"

_GGUF_MODEL = "tokenizer.ggml.model"
# llama.cpp's name of a SentencePiece vocabulary
_GGUF_SENTENCEPIECE = "llama"
_GGUF_PIECES = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
# ids of pad, eos, bos and unk, and Gemma's own
_GGUF_IDS = {"padding": 0, "eos": 1, "bos": 2, "unknown": 3}

logger = logging.getLogger("ltx2.text")


class TokenizerError(ValueError):
    """A text encoder has no tokenizer that this engine can use."""


@dataclass(frozen=True, eq=False)
class TokenizerSource:
    """Where a tokenizer lies.

    form: ``JSON`` (of the tokenizers library), ``SENTENCEPIECE``, or ``GGUF``. path: the file. tensor: the U8 tensor of
    ``file`` that holds it; None where the file is the tokenizer, or its metadata holds it (GGUF).
    """

    form: str
    path: Path
    file: Checkpoint | None = None
    tensor: str | None = None

    def __str__(self) -> str:
        return f"{self.path}, {self.tensor}" if self.tensor else str(self.path)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A text encoder's tokenizer.

    encode: ids of a text as it stands, without special tokens around it. decode: the text of ids. bos: the id that
    begins every prompt. size: ids below it can be decoded; a text encoder may have more.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    bos: int
    size: int


def tokenize(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a stripped prompt, as plain text: one leading BOS, no EOS, no padding, at most 1024 in all.

    A longer prompt keeps its beginning and a warning is logged. An empty prompt is the BOS alone.
    """
    ids = list(tokenizer.encode(prompt.strip()))
    if ids[:1] != [tokenizer.bos]:
        ids.insert(0, tokenizer.bos)
    if len(ids) > MAX_TOKENS:
        logger.warning("the prompt has %d tokens; only the first %d are used", len(ids), MAX_TOKENS)
    return ids[:MAX_TOKENS]


# where it lies --------------------------------------------------------------------------------------------------------


def tokenizer_in_folder(*folders: Path) -> TokenizerSource:
    """The tokenizer file of the first folder that has one. Raises TokenizerError where none has."""
    for folder in folders:
        for name in (JSON, SENTENCEPIECE):
            if (folder / name).is_file():
                return TokenizerSource(name, folder / name)
    raise TokenizerError(
        f"{folders[0]} has no tokenizer: it needs {JSON} or {SENTENCEPIECE} from the text encoder's original folder"
    )


def tokenizer_of_file(file: Checkpoint) -> TokenizerSource:
    """The tokenizer that a single file holds, or else one beside it.

    Beside it: in the file's folder, in a folder of the file's name without its ending, or in ``tokenizer``. Raises
    TokenizerError, naming these places, where there is none.
    """
    if file.metadata.get(_GGUF_MODEL) == _GGUF_SENTENCEPIECE:
        return TokenizerSource(GGUF, file.path, file)
    for tensor, form in _TENSORS.items():
        if tensor in file.tensors:
            return TokenizerSource(form, file.path, file, tensor)
    folder = file.path.parent
    try:
        return tokenizer_in_folder(folder, file.path.with_suffix(""), folder / "tokenizer")
    except TokenizerError as error:
        raise TokenizerError(
            f"{file.path.name} holds no tokenizer. Put {JSON} or {SENTENCEPIECE} of the same text encoder (from its "
            f"original folder) into {file.path.with_suffix('')}, a folder named like the file"
        ) from error


# reading it -----------------------------------------------------------------------------------------------------------


def load_tokenizer(source: TokenizerSource) -> Tokenizer:
    """Read a tokenizer, which takes a second or two for a real one. No code is run and nothing is written.

    Raises TokenizerError or CheckpointError when it cannot be used.
    """
    try:
        return _LOADERS[source.form](source)
    except (TokenizerError, CheckpointError):
        raise
    # the libraries raise plain Exception for files that they cannot read
    except Exception as error:
        raise TokenizerError(f"the tokenizer in {source} cannot be loaded: {str(error)[:300]}") from error


def _load_json(source: TokenizerSource) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_buffer(_read(source))
    # what a file asks for beyond the ids is not for prompts
    backend.no_padding()
    backend.no_truncation()
    bos = backend.token_to_id(_BOS)
    if bos is None:
        raise TokenizerError(f"the tokenizer in {source} has no token {_BOS}; use the one of the text encoder")
    size = backend.get_vocab_size(with_added_tokens=True)
    return Tokenizer(lambda text: backend.encode(text, add_special_tokens=False).ids, backend.decode, bos, size)


def _load_sentencepiece(source: TokenizerSource) -> Tokenizer:
    return _from_sentencepiece(_read(source), source)


def _load_gguf(source: TokenizerSource) -> Tokenizer:
    """The vocabulary as llama.cpp writes it, turned back into the SentencePiece model that it was taken from."""
    assert source.file is not None
    arrays = read_arrays(source.path, _GGUF_PIECES)
    texts, scores, kinds = (arrays.get(name, []) for name in _GGUF_PIECES)
    if not texts or not len(texts) == len(scores) == len(kinds) or not isinstance(texts[0], str):
        lengths = ", ".join(f"{name} has {len(arrays.get(name, []))}" for name in _GGUF_PIECES)
        raise TokenizerError(f"the vocabulary in {source} is incomplete: {lengths} entries; download it again")
    pad, eos, bos, unk = (_gguf_id(source.file, name, default, len(texts)) for name, default in _GGUF_IDS.items())
    kinds[unk] = UNKNOWN
    pieces = [
        _gguf_piece(text, float(score), int(kind), parsed=i not in (pad, eos, bos))
        for i, (text, score, kind) in enumerate(zip(texts, scores, kinds, strict=True))
    ]
    return _from_sentencepiece(sentencepiece_model(pieces, pad=pad, eos=eos, bos=bos, unk=unk), source)


def _gguf_piece(text: str, score: float, kind: int, *, parsed: bool) -> Piece:
    """llama.cpp writes runs of spaces as they are, and marks tokens that a text may spell out as control tokens."""
    if kind == CONTROL and parsed:
        kind = USER_DEFINED
    return Piece(text.replace(" ", _SPACE) if kind == USER_DEFINED else text, score, kind)


def _gguf_id(file: Checkpoint, name: str, default: int, count: int) -> int:
    key = f"tokenizer.ggml.{name}_token_id"
    text = file.metadata.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < count):
        raise TokenizerError(f"{file.path}: {key} is {text[:40]!r}, needs an id of its {count} tokens")
    return int(text)


def _from_sentencepiece(model: bytes, source: TokenizerSource) -> Tokenizer:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise TokenizerError(f"the tokenizer in {source} needs the package sentencepiece: pip install it") from error
    processor: Any = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    bos = processor.bos_id()
    if bos < 0:
        raise TokenizerError(f"the tokenizer in {source} has no BOS token; use the one of the text encoder")
    return Tokenizer(processor.encode, lambda ids: processor.decode(list(ids)), bos, processor.get_piece_size())


def _read(source: TokenizerSource) -> bytes:
    limit = _MAX_BYTES[source.form]
    if source.file is None or source.tensor is None:
        size = source.path.stat().st_size
        _check_size(source, size, limit)
        with source.path.open("rb") as file:
            return file.read(limit)
    info = source.file.tensors[source.tensor]
    _check_size(source, info.size_bytes, limit)
    if info.dtype not in ("U8", "I8") or len(info.shape) != 1:
        raise TokenizerError(f"{source} must be a row of bytes (U8), found {info.dtype} {list(info.shape)}")
    [(_, data)] = read_tensors(source.file, [source.tensor], device="cpu")
    return data.view(torch.uint8).numpy().tobytes()


def _check_size(source: TokenizerSource, size: int, limit: int) -> None:
    if size > limit:
        raise TokenizerError(f"{source} has {size} bytes; a {source.form} has at most {limit}")


_LOADERS = {JSON: _load_json, SENTENCEPIECE: _load_sentencepiece, GGUF: _load_gguf}
