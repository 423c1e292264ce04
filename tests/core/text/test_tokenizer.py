"""Token ids of prompts, from every form of tokenizer: with and without a BOS of its own, as JSON, SentencePiece, GGUF."""

import logging

import pytest
import torch
from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError, read_header
from ltx2_engine.ltx2_core.text import tokenizer as module
from ltx2_engine.ltx2_core.text.sentencepiece_model import BYTE, CONTROL, UNKNOWN, Piece, sentencepiece_model
from ltx2_engine.ltx2_core.text.tiny_tokenizer import BOS, EOS, PAD, SPECIAL, UNK, pieces, spiece_model, tokenizer_json
from ltx2_engine.ltx2_core.text.tokenizer import (
    MAX_TOKENS,
    TokenizerError,
    load_tokenizer,
    tokenize,
    tokenizer_in_folder,
    tokenizer_of_file,
)
from safetensors.torch import save_file

WORDS = ("<pad>", "<eos>", "<bos>", "<unk>", "a", "red", "fox")


@pytest.fixture(params=["adds bos", "does not", "adds bos and eos"])
def tokenizer(request, tmp_path):
    """A word-level tokenizer: a = 4, red = 5, fox = 6."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(list(WORDS[:4]))
    if request.param != "does not":
        template = "<bos> $A <eos>" if "eos" in request.param else "<bos> $A"
        words.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)]
        )
    words.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tokenizer_in_folder(tmp_path))


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a red fox", [2, 4, 5, 6]),
        ("  a red fox\n", [2, 4, 5, 6]),
        ("", [2]),
        (" \n", [2]),
        ("a blue fox", [2, 4, 3, 6]),
        ("<bos>a fox", [2, 4, 6]),
    ],
)
def test_ids_have_one_leading_bos_and_no_eos(tokenizer, prompt, ids):
    assert tokenize(tokenizer, prompt) == ids


def test_a_long_prompt_keeps_its_beginning_and_warns(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="ltx2.text"):
        assert tokenize(tokenizer, "a " + "red " * 1022) == [2, 4] + [5] * 1022
        assert not caplog.records
        ids = tokenize(tokenizer, "a " + "red " * 1023)
    assert ids == [2, 4] + [5] * 1022
    assert len(ids) == MAX_TOKENS == 1024
    assert [record.name for record in caplog.records] == ["ltx2.text"]
    assert "1025 tokens; only the first 1024" in caplog.text


# forms ----------------------------------------------------------------------------------------------------------------

PROMPTS = (
    "",
    "the other ring, then another one in the north",
    "A Fox runs over fresh SNOW while bells ring far away.",
    "Grüße, 雪! 🦊🏳️‍🌈 e\u0301 ﬁ Ｆ नमस्ते",
    "two  spaces   three\ttab\nline\n\n\nend  ",
    "<start_of_turn>user\nhi<end_of_turn> <b>x</b> <unk",
    "\u2581 \u200b\ufeff \x00 \x7f",
    "thethethe" * 50,
)


def single_file(path, **tensors):
    blobs = {name: torch.tensor(list(data), dtype=torch.uint8) for name, data in tensors.items()}
    save_file({"model.norm.weight": torch.zeros(4), **blobs}, path)
    return read_header(path)


@pytest.fixture
def forms(tmp_path, gemma_folder, write_gguf):
    """The tiny tokenizer in each form, loaded."""
    (tmp_path / "tokenizer.model").write_bytes(spiece_model())
    write_gguf(tmp_path / "g.gguf", gemma_folder)
    return {
        "spiece_model": tokenizer_of_file(single_file(tmp_path / "s.safetensors", spiece_model=spiece_model())),
        "tokenizer_json": tokenizer_of_file(
            single_file(tmp_path / "j.safetensors", tokenizer_json=tokenizer_json(adds_bos=False))
        ),
        "tokenizer.model": tokenizer_in_folder(tmp_path),
        "gguf": tokenizer_of_file(read_header(tmp_path / "g.gguf")),
    }


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_form_gives_the_ids_of_transformers(forms, gemma_folder, prompt):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(str(gemma_folder), local_files_only=True)
    want = oracle(prompt.strip())["input_ids"]
    for name, source in {**forms, "folder": tokenizer_in_folder(gemma_folder)}.items():
        tokenizer = load_tokenizer(source)
        assert tokenize(tokenizer, prompt) == want, name
        assert tokenizer.decode(tokenizer.encode("the ring Grüße, 雪")) == "the ring Grüße, 雪", name


def test_the_tiny_vocabulary_has_gemmas_ids_and_merges():
    assert (PAD, EOS, BOS, UNK) == (0, 1, 2, 3)
    texts = [piece.text for piece in pieces()]
    assert len(set(texts)) == len(texts)
    assert texts[: len(SPECIAL)] == list(SPECIAL)


def test_the_tiny_tokenizer_encodes_any_text_and_adds_the_bos_itself(gemma_folder):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(str(gemma_folder), local_files_only=True)
    tokenizer = load_tokenizer(tokenizer_in_folder(gemma_folder))
    text = "Grüße, 雪! <>\t\x00 🦊"
    assert oracle("x")["input_ids"] == tokenize(tokenizer, "x")
    assert (oracle.pad_token_id, oracle.eos_token_id, oracle.bos_token_id) == (0, 1, tokenizer.bos)
    assert tokenizer.decode(tokenize(tokenizer, text)[1:]) == text


def test_scores_decide_what_is_merged_first():
    """The text abc with ab merged before bc, and the other way round."""
    from sentencepiece import SentencePieceProcessor

    special = [Piece("<pad>", 0, CONTROL), Piece("<eos>", 0, CONTROL), Piece("<bos>", 0, CONTROL)]
    special += [Piece("<unk>", 0, UNKNOWN), *(Piece(f"<0x{value:02X}>", 0, BYTE) for value in range(256))]
    for first, second, want in (("ab", "bc", ["ab", "c"]), ("bc", "ab", ["a", "bc"])):
        merged = [Piece(first, -0.0), Piece(second, -1.0), *(Piece(c, -2.0) for c in "abc")]
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(sentencepiece_model([*special, *merged], pad=0, eos=1, bos=2, unk=3))
        assert processor.encode("abc", out_type=str) == want
        assert [processor.pad_id(), processor.eos_id(), processor.bos_id(), processor.unk_id()] == [0, 1, 2, 3]


# what is wrong with them ----------------------------------------------------------------------------------------------


def test_missing_and_broken_tokenizers_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"needs tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tokenizer_in_folder(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be loaded"):
        load_tokenizer(tokenizer_in_folder(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\xff\x0f")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model cannot be loaded"):
        load_tokenizer(tokenizer_in_folder(tmp_path))


def test_a_tokenizer_without_bos_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="has no token <bos>"):
        load_tokenizer(tokenizer_in_folder(tmp_path))


def test_code_in_the_folder_is_never_run(tmp_path, gemma_folder):
    (tmp_path / "tokenizer.json").write_bytes((gemma_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}}')
    (tmp_path / "mine.py").write_text("raise SystemExit('code of the folder ran')\n")
    assert tokenize(load_tokenizer(tokenizer_in_folder(tmp_path)), "x") == tokenize(
        load_tokenizer(tokenizer_in_folder(gemma_folder)), "x"
    )


def test_sizes_are_bounded_before_a_byte_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(module._MAX_BYTES, module.SENTENCEPIECE, 100)
    source = tokenizer_of_file(single_file(tmp_path / "s.safetensors", spiece_model=spiece_model()))
    with pytest.raises(TokenizerError, match=r"s\.safetensors, spiece_model has \d+ bytes; .* at most 100"):
        load_tokenizer(source)
    (tmp_path / "tokenizer.model").write_bytes(spiece_model())
    with pytest.raises(TokenizerError, match=r"tokenizer\.model has \d+ bytes"):
        load_tokenizer(tokenizer_in_folder(tmp_path))


def test_a_blob_must_be_a_row_of_bytes(tmp_path):
    save_file({"model.norm.weight": torch.zeros(4), "spiece_model": torch.zeros(8)}, tmp_path / "s.safetensors")
    with pytest.raises(TokenizerError, match=r"must be a row of bytes \(U8\), found F32 \[8\]"):
        load_tokenizer(tokenizer_of_file(read_header(tmp_path / "s.safetensors")))


def test_bytes_stored_as_int8_are_the_same_bytes(tmp_path, gemma_folder):
    data = torch.tensor(list(tokenizer_json()), dtype=torch.uint8).view(torch.int8)
    save_file({"model.norm.weight": torch.zeros(4), "tokenizer_json": data}, tmp_path / "j.safetensors")
    tokenizer = load_tokenizer(tokenizer_of_file(read_header(tmp_path / "j.safetensors")))
    assert tokenizer.encode("Grüße the") == load_tokenizer(tokenizer_in_folder(gemma_folder)).encode("Grüße the")


def test_a_vocabulary_that_lies_is_refused(tmp_path, gemma_folder, write_gguf):
    path = tmp_path / "g.gguf"
    write_gguf(path, gemma_folder)
    data = path.read_bytes()
    source = tokenizer_of_file(read_header(path))

    def with_bytes(old, new):
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))

    tokens = b"tokenizer.ggml.tokens" + (9).to_bytes(4, "little") + (8).to_bytes(4, "little")
    count = len(pieces()).to_bytes(8, "little")
    with_bytes(tokens + count, tokens + (2**40).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match="would list 1099511627776 strings"):
        load_tokenizer(source)
    with_bytes(b"tokenizer.ggml.scores", b"tokenizer.ggml.scoreX")
    with pytest.raises(TokenizerError, match=r"incomplete: .*tokenizer\.ggml\.scores has 0"):
        load_tokenizer(source)
    bos = b"tokenizer.ggml.bos_token_id" + (4).to_bytes(4, "little")
    with_bytes(bos + BOS.to_bytes(4, "little"), bos + (10**6).to_bytes(4, "little"))
    with pytest.raises(TokenizerError, match="bos_token_id is '1000000'"):
        load_tokenizer(tokenizer_of_file(read_header(path)))
