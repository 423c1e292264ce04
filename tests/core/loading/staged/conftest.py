"""Files, small rings, and every way into memory; no test leaves a thread behind."""

import pytest
from ltx2_engine.ltx2_core.loading import ring, staged
from ltx2_engine.ltx2_core.loading.checkpoint import read_header
from safetensors.torch import save_file

from .shared import Late, readers


@pytest.fixture(params=["host", "plain", "late", "mixed"])
def path_to_memory(request, monkeypatch):
    """Straight into host memory; through slots with copies that end at once, or late; or by who made the tensor."""
    if request.param == "plain":
        monkeypatch.setattr(ring.Target, "is_host_memory", lambda self, tensor: False)
    elif request.param in ("late", "mixed"):
        monkeypatch.setattr(staged, "target_of", Late)
        monkeypatch.setattr(Late, "given_is_host", request.param == "mixed")
    return request.param


@pytest.fixture
def sizes(monkeypatch):
    """A function that sets how large chunks are and how many are in flight."""

    def set_sizes(chunk=16, slots=3, least=None):
        monkeypatch.setattr(ring, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(ring, "MIN_CHUNK_BYTES", least or chunk)
        monkeypatch.setattr(ring, "DEPTH", slots)
        monkeypatch.setattr(ring, "SLOT_BYTES", max(1, chunk * 2 // 5))

    return set_sizes


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert readers() == []


@pytest.fixture
def file(tmp_path):
    """A function that writes tensors and returns the file's header."""

    def write(tensors, name="a.safetensors"):
        save_file(tensors, tmp_path / name)
        return read_header(tmp_path / name)

    return write
