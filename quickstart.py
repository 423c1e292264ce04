"""The two commands of a fresh clone, with the standard library only.

``python3 quickstart.py`` makes ``.venv``, writes a tiny random model and turns a text into a clip with sound.
``python3 quickstart.py test`` adds the test tools to ``.venv`` and runs the checks and the tests.
Both can be repeated; what is installed already is not installed again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
MODELS, OUTPUT = ROOT / "models", ROOT / "output"

# each set of pins with the further options that pip needs for it
SETS = {"demo": (), "test": (), "reference": ("--no-deps",)}
PACK = ("__init__.py", "cli.py", "kernels", "ltx2_core", "nodes")

CHECKPOINT, TEXT_ENCODER = "ltx-2.3-tiny.safetensors", "gemma-3-tiny"
DEMO = {
    "LTX2LoadModel.checkpoint": CHECKPOINT,
    "LTX2LoadModel.text_encoder": TEXT_ENCODER,
    "LTX2EmptyLatent.width": 320,
    "LTX2EmptyLatent.height": 192,
    "LTX2EmptyLatent.frames": 49,
    "SaveVideo.filename_prefix": "quickstart",
}


class Stop(Exception):
    """Ends the program with an exit code, after a message unless the failed command gave one."""

    def __init__(self, code: int, message: str = ""):
        super().__init__(message)
        self.code = code


def main(arguments: list[str]) -> int:
    commands = {"": demo, "test": test}
    name = arguments[0] if arguments else ""
    try:
        if name == "sheet":  # the second half of demo(), in the environment's Python
            write_sheet(Path(arguments[1]))
            return 0
        if len(arguments) > 1 or name not in commands:
            raise Stop(2, "usage: python3 quickstart.py [test]")
        check_python()
        commands[name]()
        return 0
    except Stop as stop:
        if str(stop):
            print(f"quickstart: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; run it again to go on", file=sys.stderr)
        return 130


def demo() -> None:
    """Text to a clip with sound, on tiny random weights."""
    install("demo")
    if not (MODELS / "checkpoints" / CHECKPOINT).is_file() or not (MODELS / "text_encoders" / TEXT_ENCODER).is_dir():
        say("writing a tiny random model")
        call(PYTHON, ROOT / "cli.py", "tiny", "--models", MODELS)
    say("running workflows/api/text_to_video.json")
    settings = [part for name, value in DEMO.items() for part in ("--set", f"{name}={value}")]
    folders = ["--models", MODELS, "--output", OUTPUT]
    flow = ROOT / "workflows" / "api" / "text_to_video.json"
    lines = call(PYTHON, ROOT / "cli.py", "run", flow, *folders, *settings, capture=True).splitlines()
    video = next(Path(line) for line in lines if line.endswith(".mp4"))
    call(PYTHON, "-I", ROOT / "quickstart.py", "sheet", video)
    print(video, video.with_suffix(".png"), sep="\n")
    say("the weights are random: the clip shows that everything works, not what the model can do")


def test() -> None:
    """Style, types and the tests that need no GPU."""
    install("demo", "test", "reference")
    say("ruff")
    call(PYTHON, "-m", "ruff", "check", ".")
    call(PYTHON, "-m", "ruff", "format", "--check", ".")
    say("mypy")
    check_types()
    say("pytest")
    # files side by side; each process takes 2 GB. Threads of all of them on all cores would take turns
    cores = os.cpu_count() or 1
    processes = min(cores, 4)
    os.environ.setdefault("OMP_NUM_THREADS", str(cores // processes))
    call(PYTHON, "-m", "pytest", "-q", "-n", str(processes), "--dist", "loadfile")


def check_types() -> None:
    """mypy on a copy of the pack under its import name, which the name of this folder need not be."""
    with tempfile.TemporaryDirectory(prefix="ltx2-types-") as folder:
        copy = Path(folder) / "ltx2_engine"
        copy.mkdir()
        for name in PACK:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, copy / name)
        options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
        call(PYTHON, "-m", "mypy", *options, "-p", "ltx2_engine", folder=Path(folder))


def write_sheet(video: Path) -> None:
    """A contact sheet of a video, beside it as PNG."""
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [str(ROOT)]
    sys.modules["ltx2_engine"] = package
    from ltx2_engine.ltx2_core.media import read_video, write_contact_sheet

    write_contact_sheet(video.with_suffix(".png"), read_video(video).images)


# installing ----------------------------------------------------------------------------------------------------------


def check_python() -> None:
    found = sys.version_info[:2]
    if found < (3, 10):
        raise Stop(2, "Python 3.10 or newer is needed, this is {}.{}; try python3.11 quickstart.py".format(*found))
    if found > (3, 13):
        say("Python {}.{} is newer than what this was tested with (3.10 to 3.13)".format(*found))


def install(*names: str) -> None:
    """Bring the sets of ``requirements/`` into ``.venv``, unless their stamp there is that of the files as they are."""
    make_environment()
    for name in names:
        pins = ROOT / "requirements" / f"{name}.txt"
        stamp = VENV / f"installed-{name}"
        digest = hashlib.sha256(pins.read_bytes()).hexdigest()
        if stamp.is_file() and stamp.read_text() == digest:
            continue
        say(f"installing requirements/{name}.txt into .venv (the first time takes minutes)")
        pip = [PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        try:
            call(*pip, *SETS[name], "-r", pins)
        except Stop as failed:
            raise Stop(
                failed.code,
                "pip could not install the packages; its message is above. Without a network, or behind a proxy, set "
                "HTTPS_PROXY or PIP_INDEX_URL for pip; then run this again.",
            ) from None
        stamp.write_text(digest)


def make_environment() -> None:
    if PYTHON.exists() and subprocess.run([PYTHON, "-c", "import pip"], stderr=subprocess.DEVNULL).returncode == 0:
        return
    say(f"making {VENV}")
    try:
        call(sys.executable, "-m", "venv", VENV)
    except Stop as failed:
        raise Stop(
            failed.code,
            "Python could not make a virtual environment; its message is above. On Debian and Ubuntu install the venv "
            f"module: apt install python3.{sys.version_info[1]}-venv. Else remove {VENV} and run this again.",
        ) from None


# running -------------------------------------------------------------------------------------------------------------


def call(*command: str | Path, capture: bool = False, folder: Path = ROOT) -> str:
    """Run a command to its end and return what it printed, if captured. Raises Stop with its exit code if it failed."""
    stdout = subprocess.PIPE if capture else None
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=stdout, text=True, cwd=folder)
    try:
        printed, _ = process.communicate()
    except KeyboardInterrupt:
        end(process)
        raise
    if process.returncode:
        # a process that a signal ended has minus its number, which shells show as 128 and the number
        raise Stop(128 - process.returncode if process.returncode < 0 else process.returncode)
    return printed or ""


def end(process: subprocess.Popen[str]) -> None:
    """Wait for a process that the same Ctrl-C reached, and end one that it did not."""
    try:
        process.wait(10)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.terminate()
        process.wait()


def say(text: str) -> None:
    print(f"== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
