"""A tiny tokenizer of Gemma's kind, in both of its forms: a few merges, every other character as bytes."""

from __future__ import annotations

from collections.abc import Sequence

from .sentencepiece_model import BYTE, CONTROL, UNKNOWN, USER_DEFINED, Piece, sentencepiece_model

# The first ids are Gemma's own
SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
PAD, EOS, BOS, UNK = range(4)
VOCABULARY = 320

_SPACE = "\u2581"
_LETTERS = (_SPACE, *"etaoinshrdlucmfwygpbvkxqjz")
# in the order in which they are merged
_MERGED = (
    "th",
    "he",
    "in",
    "er",
    "an",
    "re",
    f"{_SPACE}t",
    f"{_SPACE}a",
    f"{_SPACE}the",
    "the",
    "on",
    "ing",
    _SPACE * 2,
)


def pieces() -> list[Piece]:
    """The vocabulary as SentencePiece has it; as many as the embedding has rows, or fewer."""
    kinds = {"<pad>": CONTROL, "<eos>": CONTROL, "<bos>": CONTROL, "<unk>": UNKNOWN}
    special = [Piece(text, 0.0, kinds.get(text, USER_DEFINED)) for text in SPECIAL]
    bytes_ = [Piece(f"<0x{value:02X}>", 0.0, BYTE) for value in range(256)]
    merged = [Piece(text, float(-rank)) for rank, text in enumerate((*_MERGED, *_LETTERS))]
    found = [*special, *bytes_, *merged]
    assert len(found) <= VOCABULARY
    return found


def spiece_model() -> bytes:
    """The SentencePiece model of these pieces."""
    return sentencepiece_model(pieces(), pad=PAD, eos=EOS, bos=BOS, unk=UNK)


def tokenizer_json(*, adds_bos: bool = True) -> bytes:
    """The same tokenizer for the tokenizers library. adds_bos: as Gemma 3's does and Gemma 4's does not."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    texts = [piece.text for piece in pieces()]
    model = models.BPE(
        vocab={text: i for i, text in enumerate(texts)},
        merges=_merges(texts),
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer.to_str().encode()


def _merges(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, in the order of the pieces."""
    known = set(texts)
    splits = ((text[:i], text[i:]) for text in _MERGED for i in range(1, len(text)))
    return [(left, right) for left, right in splits if left in known and right in known]
