"""Whether a text encoder is the one that a transformer was trained with."""

from __future__ import annotations

import json
import logging
from typing import Any

from ..config.version import ModelVersion
from ..loading.checkpoint import Checkpoint
from .encoder_config import GEMMA3, WHAT_FITS, GemmaError, family, gemma_version
from .encoder_files import TextEncoderFiles

_KEY = "gemma_source_checkpoint"
_MAX_CHARACTERS = 10_000

logger = logging.getLogger("ltx2.text")


def check_pairing(transformer: Checkpoint, version: ModelVersion, encoder: TextEncoderFiles) -> None:
    """Compare the text encoder that a transformer names with the one that is given, as ltx-core 1.2 does.

    A transformer that names none and is of 2.4.0 or later goes with an encoder that states no version either, with a
    warning; an older one needs Gemma 3. Raises GemmaError, saying what was found and what fits.
    """
    stated, wanted = gemma_version(encoder.config), _wanted(transformer)
    name = transformer.path.name
    if wanted is not None:
        if stated != wanted:
            raise GemmaError(
                f"{encoder.path}: {name} was trained with the text encoder {wanted!r}, but this one is "
                f"{'of no stated version' if stated is None else repr(stated)} ({encoder.version}). {WHAT_FITS}"
            )
    elif version.at_least(2, 4, 0):
        if stated is not None:
            raise GemmaError(
                f"{encoder.path}: this text encoder is {stated!r}, but {name} does not say which one it was trained with "
                f"({_KEY} in its metadata): use the transformer file as it was released"
            )
        logger.warning("neither %s nor %s states the text encoder's version: they may not fit", name, encoder.path.name)
    elif family(encoder.config) != GEMMA3:
        raise GemmaError(
            f"{encoder.path}: this text encoder is {encoder.version}, but {name} is of LTX-{version.label}, which was "
            f"trained with Gemma 3. {WHAT_FITS}"
        )


def _wanted(transformer: Checkpoint) -> str | None:
    """The version of the text encoder that a transformer names; None where it names none."""
    text = transformer.metadata.get(_KEY)
    if text is None:
        return None
    found: Any = None
    if len(text) <= _MAX_CHARACTERS:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
    wanted = found.get("gemma_version") if isinstance(found, dict) else None
    if not isinstance(wanted, str):
        raise GemmaError(
            f"{transformer.path}: {_KEY} in the metadata must be an object with a gemma_version, found {text[:80]!r}; "
            "use the file as it was released"
        )
    return wanted
