from types import SimpleNamespace

import pytest
import torch
from ltx2_engine.ltx2_core.loading import pinned
from ltx2_engine.ltx2_core.loading.pinned import PinnedMemory


def test_memory_has_at_least_the_bytes_asked_for():
    for count in (0, 1, 4096, 4097):
        made = PinnedMemory(count)
        assert made.memory.dtype == torch.uint8
        assert made.memory.nbytes >= count
        made.memory.fill_(7)
        made.close()
        assert not made.pinned


def test_memory_that_cannot_be_pinned_is_used_as_it_is_with_one_warning(monkeypatch, caplog):
    pinned._warn_pageable.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refuses = SimpleNamespace(cudaHostRegister=lambda *_: 2, cudaHostUnregister=lambda *_: pytest.fail("not pinned"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refuses)
    for _ in range(3):
        made = PinnedMemory(100)
        assert not made.pinned
        assert made.memory.fill_(1).sum() == made.memory.nbytes
        made.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be pinned (CUDA error 2)" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_memory_that_cannot_be_pinned_is_used_as_it_is(caplog):
    pinned._warn_pageable.cache_clear()
    memory = pinned.pages(1 << 20)
    assert pinned._pin(memory)
    assert not pinned._pin(memory), "pinned twice"
    assert not pinned._pin(memory)
    assert len([r for r in caplog.records if "pinned" in r.message]) == 1
    torch.ones(1, device="cuda").add_(1).item()  # the failure is not left behind for the next kernel
    pinned._unpin(memory)
