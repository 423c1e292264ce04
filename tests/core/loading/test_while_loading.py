"""What Python does otherwise while a model is loaded: over when the last thread has left, and then as it was before."""

import gc
import threading

import pytest
import torch
from ltx2_engine.ltx2_core.component import Component, NetworkFiles
from ltx2_engine.ltx2_core.loading.build import Source
from ltx2_engine.ltx2_core.loading.checkpoint import read_header
from ltx2_engine.ltx2_core.loading.store import WeightStore
from ltx2_engine.ltx2_core.loading.weights import weights_of
from ltx2_engine.ltx2_core.loading.while_loading import while_loading
from safetensors.torch import save_file
from torch import nn


@pytest.fixture(autouse=True)
def as_it_was():
    assert gc.isenabled()
    yield
    assert while_loading._inside == 0
    gc.enable()


@pytest.mark.parametrize("on", [True, False])
def test_it_is_afterwards_as_it_was_before(on):
    if not on:
        gc.disable()
    with while_loading:
        assert not gc.isenabled()
        with while_loading:
            assert not gc.isenabled()
        assert not gc.isenabled(), "the outer pause is not over"
    assert gc.isenabled() is on


@pytest.mark.parametrize("frozen", [False, True])
def test_what_was_made_inside_is_not_looked_at_afterwards(frozen):
    looked = []

    def note(phase, about):
        if phase == "stop":
            looked.append(about["generation"])

    if frozen:
        gc.freeze()
    count = gc.get_freeze_count()
    gc.callbacks.append(note)
    try:
        with while_loading:
            made = [[] for _ in range(100_000)]
        young = len(gc.get_objects(0))
        # frozen things go too when nobody holds them any more
        assert count - 1000 < gc.get_freeze_count() <= count
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
    assert frozen or young < 10_000
    assert frozen or not looked
    assert len(made) == 100_000


def test_an_error_ends_it():
    @while_loading
    def fails():
        assert not gc.isenabled()
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            fails()
        assert gc.isenabled()


def test_the_last_thread_that_leaves_ends_it():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with while_loading:
            entered.set()
            leave.wait(10)

    with while_loading:
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(10)
    assert not gc.isenabled(), "the other thread is still inside"
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_many_threads_at_once():
    seen = []

    def come_and_go():
        for _ in range(500):
            with while_loading:
                seen.append(gc.isenabled())

    threads = [threading.Thread(target=come_and_go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(seen)
    assert gc.isenabled()


def test_a_load_is_such_a_pause_from_the_module_to_the_last_byte(tmp_path, monkeypatch):
    """Of any network: all are built, planned and read in the same place."""
    save_file(nn.Linear(3, 5).state_dict(), tmp_path / "linear.safetensors")
    file = read_header(tmp_path / "linear.safetensors")
    seen = {}

    def build():
        seen["built"] = gc.isenabled()
        return nn.Linear(3, 5, device="meta")

    def note(name):
        method = getattr(WeightStore, name)

        def noting(*args, **kwargs):
            seen[name] = gc.isenabled()
            return method(*args, **kwargs)

        monkeypatch.setattr(WeightStore, name, noting)

    for name in ("__init__", "_task", "_arrive"):
        note(name)
    sources = [Source(name, file, weight) for name, weight in weights_of(file).items()]
    component = Component("network", NetworkFiles(build, sources), device="cpu", dtype=torch.float32)
    component.use(0)
    assert seen == {"built": False, "__init__": False, "_task": False, "_arrive": False}
    assert gc.isenabled()
    component.close()
