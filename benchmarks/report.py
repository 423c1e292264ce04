"""Results of benchmarks: one JSON file a run, and the tables of benchmarks/README.md made from them.

python benchmarks/report.py   writes the tables
"""

from __future__ import annotations

import json
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results"
MARK = "<!-- tables below are written by report.py -->"


@dataclass(frozen=True)
class Row:
    """One figure. bar: what had to be reached, empty where nothing was asked."""

    id: str
    value: float
    unit: str
    bar: str = ""


def write(folder: pathlib.Path, name: str, rows: list[Row], packages: Sequence[str] = ()) -> pathlib.Path:
    """Write ``name``.json with hardware, versions (of these packages too), command and rows."""
    import torch

    result = {
        "hardware": hardware(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{package: _version(package) for package in ("transformers", *packages)},
        },
        "command": _command(),
        "rows": [asdict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def hardware() -> str:
    import torch

    if not torch.cuda.is_available():
        return "CPU"
    device = torch.cuda.get_device_properties(0)
    return f"{torch.cuda.device_count()} x {device.name}, {device.total_memory / 2**30:.0f} GiB"


# options that say where files are, which is one machine's business
_PLACES = ("--out", "--folder", "--text-folder")


def _command() -> str:
    return shlex.join(without_places(["python", *sys.argv]))


def without_places(words: Sequence[str]) -> list[str]:
    """A command line without where its files are."""
    named = [word for word in words if not word.startswith(tuple(f"{option}=" for option in _PLACES))]
    return [
        word for before, word in zip(["", *named], named, strict=False) if word not in _PLACES and before not in _PLACES
    ]


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:  # figures are not lost over a package without its metadata
        return "unknown"


def table(path: pathlib.Path) -> str:
    """One result as Markdown."""
    result = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"### {path.stem}",
        "",
        f"{result['hardware']}; {versions}. `{result['command']}`",
        "",
        "| | value | unit | bar |",
        "|---|--:|---|---|",
        *(f"| {row['id']} | {row['value']:.6g} | {row['unit']} | {row['bar']} |" for row in result["rows"]),
        "",
    ]
    return "\n".join(lines)


def tables() -> str:
    return "\n".join(table(path) for path in sorted(RESULTS.glob("*.json")))


def write_readme() -> None:
    readme = HERE / "README.md"
    head = readme.read_text(encoding="utf-8").split(MARK)[0]
    readme.write_text(f"{head}{MARK}\n\n{tables()}", encoding="utf-8")


if __name__ == "__main__":
    write_readme()
