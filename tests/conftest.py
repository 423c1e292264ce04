"""The pack under its canonical name, the repository kept off the import path, and the oracles."""

import importlib.machinery
import os
import pathlib
import sys
import types

import pytest
import torch

if not torch.cuda.is_available():
    # read when Triton is first imported, by a kernel or by torch's compiler; only tests of kernels send CPU tensors there
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = pathlib.Path(__file__).resolve().parents[1]

# `python -m pytest` puts the working directory on the path, where `nodes` and `kernels` would shadow other packages
sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]

if "ltx2_engine" not in sys.modules:
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [str(ROOT)]
    sys.modules["ltx2_engine"] = package


def _stand_in_for_torchaudio() -> None:
    """ltx-core imports torchaudio for its mel front end only, and it cannot be loaded beside a CPU build of torch."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        for name in ("torchaudio", "torchaudio.transforms", "torchaudio.functional"):
            module = types.ModuleType(name)
            # transformers asks for the spec of what it finds
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)


_stand_in_for_torchaudio()


@pytest.fixture(scope="session")
def diffusers():
    """The diffusers oracle; tests that use it skip where it is not installed."""
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


@pytest.fixture(scope="session")
def ltx_core():
    """The ltx-core oracle; tests that use it skip where it is not installed."""
    return pytest.importorskip("ltx_core", reason="ltx-core is not installed")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A model folder with the tiny checkpoints of 2.0 and 2.3 and the tiny text encoder."""
    from ltx2_engine.ltx2_core.tiny import write_tiny_set

    root = tmp_path_factory.mktemp("models")
    for label in ("2.0", "2.3"):
        write_tiny_set(root, label)
    return root


@pytest.fixture(scope="session")
def tiny_engine(tiny_models):
    """A function from a version to the float32 CPU engine of its tiny checkpoint."""
    from ltx2_engine.ltx2_core.handles import open_engine
    from ltx2_engine.ltx2_core.model_spec import ModelSpec
    from ltx2_engine.ltx2_core.tiny import TEXT_ENCODER, checkpoint_file

    engines = {}

    def engine(label):
        if label not in engines:
            checkpoint = tiny_models / "checkpoints" / checkpoint_file(label)
            encoder = tiny_models / "text_encoders" / TEXT_ENCODER
            engines[label] = open_engine(ModelSpec.of(checkpoint, encoder, dtype="float32", device="cpu"))
        return engines[label]

    return engine
