"""Token ids of prompts, with tokenizers that add the BOS (Gemma 3) and that do not."""

import json
import logging

import pytest
from ltx2_engine.ltx2_core.text.tokenizer import MAX_TOKENS, TokenizerError, load_tokenizer, tokenize

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
    named = {f"{kind}_token": f"<{kind}>" for kind in ("pad", "eos", "bos", "unk")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    return load_tokenizer(tmp_path)


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


def test_the_tiny_tokenizer_encodes_any_text_and_adds_the_bos_itself(gemma_folder):
    tokenizer = load_tokenizer(gemma_folder)
    text = "Grüße, 雪! <>\t\x00 🦊"
    assert tokenizer("x")["input_ids"] == tokenize(tokenizer, "x")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.decode(tokenize(tokenizer, text)[1:], clean_up_tokenization_spaces=False) == text


def test_missing_and_broken_tokenizers_are_named(tmp_path, gemma_folder):
    with pytest.raises(TokenizerError, match=r"needs tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_code_in_the_folder_is_refused(tmp_path, gemma_folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((gemma_folder / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('code of the folder ran')\n")
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
