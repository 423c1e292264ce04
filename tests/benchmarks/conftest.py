"""The benchmarks' modules, which are scripts beside each other and not a package."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture(scope="session")
def module():
    """A function from a script's name to its module."""

    def load(name):
        sys.path.insert(0, FOLDER)
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(FOLDER)

    return load


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny operations: the threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def values():
    """A function from rows to their values by name."""
    return lambda rows: {row.id: row.value for row in rows}
