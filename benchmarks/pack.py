"""First import of every benchmark: puts the pack under its canonical name, as the installed package has it."""

import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]

if "ltx2_engine" not in sys.modules:
    _package = types.ModuleType("ltx2_engine")
    _package.__path__ = [str(ROOT)]
    sys.modules["ltx2_engine"] = _package
