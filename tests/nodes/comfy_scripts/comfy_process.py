"""ComfyUI in this process, on CPU, without a server: what the scripts beside this file share."""

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any


class LogLines(logging.Handler):
    """Keeps every message of the root logger, so that a test can search it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class ServerStub:
    """The three members of ComfyUI's server that its executor uses."""

    def __init__(self) -> None:
        self.client_id: str | None = None
        self.last_node_id: str | None = None
        self.sent: list[tuple[str, Any]] = []

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        self.sent.append((event, data))


def start(tree: Path, base: Path, models: Path | None = None) -> LogLines:
    """Import ComfyUI from `tree` on CPU with its models, input, output and temp folders under `base`.

    models: another models folder, laid out as ComfyUI's. Where this Python lacks ComfyUI's requirements the process ends
    with the answer {"unusable": reason}.
    """
    # ComfyUI's own modules have common names (nodes, utils), so its tree comes before this folder
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or ".").resolve() != here)]
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(base)
    args.models_directory = None if models is None else str(models)
    args.disable_api_nodes = True
    log = LogLines()
    logging.getLogger().addHandler(log)

    try:
        import execution  # noqa: F401
        import folder_paths
    except (ImportError, OSError, RuntimeError) as error:
        answer({"unusable": f"{sys.executable} cannot import ComfyUI from {tree}: {type(error).__name__}: {error}"})
        raise SystemExit(0) from error

    for name in ("input", "output", "temp"):
        folder = base / name
        folder.mkdir(parents=True, exist_ok=True)
        getattr(folder_paths, f"set_{name}_directory")(str(folder))
    return log


def load_pack(path: Path) -> bool:
    """Load one custom node pack by the path ComfyUI would use; a link keeps the link's name."""
    import nodes

    return asyncio.run(nodes.load_custom_node(str(path)))


def load_core(tree: Path, *names: str) -> None:
    """Load files of ComfyUI's comfy_extras folder by name, such as "nodes_video"."""
    import nodes

    for name in names:
        path = tree / "comfy_extras" / f"{name}.py"
        if not asyncio.run(nodes.load_custom_node(str(path), module_parent="comfy_extras")):
            raise RuntimeError(f"ComfyUI could not load its own {path}")


def answer(result: dict[str, Any]) -> None:
    """Print the result as the last line of the process."""
    sys.stdout.write("\n" + json.dumps(result, default=str) + "\n")
    sys.stdout.flush()
