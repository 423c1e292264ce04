"""Prompts to token ids."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

MAX_TOKENS = 1024

_FILES = ("tokenizer.json", "tokenizer.model")

logger = logging.getLogger("ltx2.text")


class TokenizerError(ValueError):
    """A text encoder's folder has no tokenizer that this engine can use."""


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer beside a text encoder's ``config.json``: local files only, no code from the folder.

    Raises TokenizerError when the files are missing or cannot be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _FILES):
        raise TokenizerError(
            f"{folder} has no tokenizer: it needs tokenizer.json or tokenizer.model, with tokenizer_config.json, "
            "from the text encoder's original folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TokenizerError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if tokenizer.bos_token_id is None:
        raise TokenizerError(f"the tokenizer in {folder} defines no BOS token; check its tokenizer_config.json")
    return tokenizer


def tokenize(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a stripped prompt, as plain text: one leading BOS, no EOS, no padding, at most 1024 in all.

    A longer prompt keeps its beginning and a warning is logged. An empty prompt is the BOS alone.
    """
    bos = tokenizer.bos_token_id
    # the special tokens are added here: Gemma 3's tokenizer would add the BOS, other Gemma tokenizers do not
    ids = list(tokenizer(prompt.strip(), add_special_tokens=False, verbose=False)["input_ids"])
    if ids[:1] != [bos]:
        ids.insert(0, bos)
    if len(ids) > MAX_TOKENS:
        logger.warning("the prompt has %d tokens; only the first %d are used", len(ids), MAX_TOKENS)
    return ids[:MAX_TOKENS]
