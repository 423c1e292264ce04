"""Which text encoder goes with which transformer: the rules of ltx-core 1.2, case by case."""

import json
import logging

import pytest
import torch
from ltx2_engine.ltx2_core.config.version import ModelVersion
from ltx2_engine.ltx2_core.loading.checkpoint import read_header
from ltx2_engine.ltx2_core.text.encoder_files import read_text_encoder
from ltx2_engine.ltx2_core.text.gemma import GemmaError
from ltx2_engine.ltx2_core.text.pairing import check_pairing
from ltx2_engine.ltx2_core.text.tiny_gemma import GEMMA4_VERSION, write_tiny_gemma4
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, gemma_folder):
    paths = {version: tmp_path_factory.mktemp("pairs") / "gemma4.safetensors" for version in (GEMMA4_VERSION, None)}
    for version, path in paths.items():
        write_tiny_gemma4(path, gemma_version=version)
    return {
        "gemma3": read_text_encoder(gemma_folder),
        "ltx": read_text_encoder(paths[GEMMA4_VERSION]),
        "google": read_text_encoder(paths[None]),
    }


def transformer(tmp_path, source):
    path = tmp_path / "transformer.safetensors"
    text = source if source is None or isinstance(source, str) else json.dumps(source)
    save_file({"x": torch.zeros(1)}, path, metadata=None if text is None else {"gemma_source_checkpoint": text})
    return read_header(path)


NAMED = {"ltx_version": "2.5.0", "gemma_version": GEMMA4_VERSION}


@pytest.mark.parametrize(
    ("source", "version", "encoder", "message"),
    [
        (NAMED, (2, 5, 0), "ltx", None),
        (NAMED, (2, 5, 0), "google", "of no stated version"),
        (NAMED, (2, 5, 0), "gemma3", "trained with the text encoder 'gemma4-12b-ltx-v1', but this one is of no stated"),
        ({"gemma_version": "gemma4-12b-ltx-v2"}, (2, 5, 0), "ltx", "'gemma4-12b-ltx-v2', but this one is 'gemma4-12b-ltx-v1'"),
        (None, (2, 4), "ltx", "does not say which one it was trained with"),
        (None, (2, 5, 0), "ltx", "does not say which one it was trained with"),
        (None, (2, 4, 0), "google", None),
        (None, (2, 5, 0), "gemma3", None),
        (None, (2, 3, 9), "gemma3", None),
        (None, (2, 0), "gemma3", None),
        (None, (2, 3, 9), "ltx", "is of LTX-2.3, which was trained with Gemma 3"),
        (None, (2, 3), "google", "is of LTX-2.3, which was trained with Gemma 3"),
        ("{", (2, 5, 0), "ltx", "must be an object with a gemma_version, found '{'"),
        ("[" * 20_000, (2, 5, 0), "ltx", "must be an object with a gemma_version"),
        ({"gemma_version": 4}, (2, 5, 0), "ltx", "must be an object with a gemma_version"),
    ],
)  # fmt: skip
def test_pairs(tmp_path, encoders, caplog, source, version, encoder, message):
    file = transformer(tmp_path, source)
    with caplog.at_level(logging.WARNING, logger="ltx2.text"):
        if message is None:
            check_pairing(file, ModelVersion(version), encoders[encoder])
        else:
            with pytest.raises(GemmaError) as error:
                check_pairing(file, ModelVersion(version), encoders[encoder])
            assert message in str(error.value)
    unknown = message is None and source is None and version >= (2, 4)
    assert ("they may not fit" in caplog.text) == unknown
