"""The pack under its canonical name, and the repository kept off the import path."""

import pathlib
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# `python -m pytest` puts the working directory on the path, where `nodes` and `kernels` would shadow other packages
sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]

if "ltx2_engine" not in sys.modules:
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [str(ROOT)]
    sys.modules["ltx2_engine"] = package


def _stub_torchaudio() -> None:
    """Stand in for torchaudio, which cannot be imported beside a CPU build of torch; only its mel front end is lost."""
    import importlib.machinery

    if "torchaudio" in sys.modules:
        return
    names = ("torchaudio", "torchaudio.transforms", "torchaudio.functional")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        if "." in name:
            setattr(modules["torchaudio"], name.split(".")[1], module)
    sys.modules.update(modules)


@pytest.fixture(scope="session")
def diffusers():
    """The diffusers oracle; tests that use it skip where it is not installed."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    module = pytest.importorskip("diffusers", reason="diffusers is not installed")
    # after both imports, and before diffusers imports its models on first use
    _stub_torchaudio()
    return module


@pytest.fixture(scope="session")
def ltx_core(diffusers):
    """The ltx-core oracle, importable without torchaudio; tests that use it skip where it is not installed."""
    return pytest.importorskip("ltx_core", reason="ltx-core is not installed")
