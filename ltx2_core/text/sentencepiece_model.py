"""A SentencePiece model from a list of its pieces, for files that hold the vocabulary in another form.

Format: https://github.com/google/sentencepiece, ``src/sentencepiece_model.proto``; of it only what Gemma's tokenizer
sets: byte-pair encoding by score, unknown characters as bytes, spaces as U+2581, the text otherwise as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

# kinds of pieces; GGUF files use the same numbers
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_BPE = 2
_VARINT, _BYTES, _FLOAT = 0, 2, 5
_ONE_BYTE = [bytes([value]) for value in range(0x80)]


@dataclass(frozen=True)
class Piece:
    """One entry of a vocabulary; its id is its place in the list. A higher score is merged earlier."""

    text: str
    score: float
    kind: int = NORMAL


def sentencepiece_model(pieces: Iterable[Piece], *, pad: int, eos: int, bos: int, unk: int) -> bytes:
    """The serialised model of these pieces, for ``sentencepiece.SentencePieceProcessor``.

    Among them must be the 256 bytes ("<0x00>" to "<0xFF>"), and the ids must be of pieces of their kinds.
    """
    listed = list(pieces)
    trainer = b"".join(
        (
            _integer(3, _BPE),
            _integer(35, 1),  # byte_fallback
            *(_integer(field, value) for field, value in zip((40, 41, 42, 43), (unk, bos, eos, pad), strict=True)),
            *(_text(field, listed[i].text) for field, i in zip((45, 46, 47, 48), (unk, bos, eos, pad), strict=True)),
        )
    )
    # no prefix, no trimming, no Unicode normalisation; spaces are escaped
    normalizer = _text(1, "identity") + _integer(3, 0) + _integer(4, 0) + _integer(5, 1)
    return b"".join((*(_field(1, _piece(one)) for one in listed), _field(2, trainer), _field(3, normalizer)))


# fields 2 and 3 of a piece; packed at once, because there are a quarter of a million pieces
_SCORE_AND_KIND = struct.Struct("<BfBB")


def _piece(piece: Piece) -> bytes:
    return _text(1, piece.text) + _SCORE_AND_KIND.pack(2 << 3 | _FLOAT, piece.score, 3 << 3 | _VARINT, piece.kind)


def _text(field: int, value: str) -> bytes:
    return _field(field, value.encode())


def _field(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(value)) + value


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _varint(value: int) -> bytes:
    if value <= 0x7F:
        return _ONE_BYTE[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
