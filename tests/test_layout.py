"""The architecture as a test: who may import whom, what nobody imports, and that the package lists are complete."""

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "ltx2_core", "nodes")
FILES = [ROOT / "__init__.py", ROOT / "cli.py", *(p for top in FOLDERS for p in sorted((ROOT / top).rglob("*.py")))]
MAX_LINES = 600

# what nodes import at module level, so it may load neither torch nor numpy
BASE = {
    f"ltx2_core.{name}" for name in ("av", "config", "host", "model_spec", "paths", "presets", "shapes", "standalone")
}

# what reads the headers of weight files
HEADERS = {f"ltx2_core.loading.{name}" for name in ("checkpoint", "gguf", "weights")}

# the few modules that a ban leaves out
ALLOWED = {
    "torch.distributed": {f"ltx2_core.parallel.{name}" for name in ("collectives", "helix_collectives")},
    # pairs of connected Unix sockets
    "socket": {"ltx2_core.parallel.channel", "ltx2_core.parallel.processes"},
    "subprocess": {"ltx2_core.parallel.processes"},
    "ray": {"nodes.runner.ray_cluster"},
    # prctl, and the driver of the GPU
    "ctypes": {"ltx2_core.parallel.parent_death", "ltx2_core.parallel.device_memory"},
}

# they make the package before it can be imported
PLACE_THE_PACK = {"__init__", "cli", "nodes.runner.ray_cluster"} | {
    f"ltx2_core.parallel.{name}" for name in ("worker", "worker_entry")
}

# the longest entry that contains a file says from which units of the pack it may import, beside its own
MAY_IMPORT = {
    "kernels": set(),
    **dict.fromkeys(BASE, BASE),
    "ltx2_core": {"ltx2_core", "kernels"},
    "ltx2_core.conditioning": BASE | {"ltx2_core.media"},
    "ltx2_core.loading": BASE | {"kernels"},
    "ltx2_core.media": BASE,
    "ltx2_core.parallel.bands": BASE,
    "ltx2_core.parallel.collectives": BASE | {f"ltx2_core.parallel.{name}" for name in ("context", "groups")},
    "ltx2_core.parallel.context": BASE,
    "ltx2_core.parallel.exchange_choice": BASE
    | {"kernels", "ltx2_core.parallel.context", "ltx2_core.parallel.peer_copies"},
    "ltx2_core.parallel.groups": BASE | {"ltx2_core.parallel.context"},
    "ltx2_core.parallel.peer_copies": BASE
    | {"kernels", "ltx2_core.parallel.context", "ltx2_core.parallel.device_memory"},
    "ltx2_core.parallel.sequence": BASE
    | {f"ltx2_core.{name}" for name in ("parallel.context", "transformer.inputs", "transformer.rope")},
    "ltx2_core.parallel.topology": BASE | {"ltx2_core.parallel.groups", "ltx2_core.sampling.guidance"},
    "ltx2_core.parallel": BASE,
    "ltx2_core.sampling": BASE | {"kernels", "ltx2_core.conditioning.state"},
    "ltx2_core.text": BASE | HEADERS | {"kernels", "ltx2_core.loading.write"},
    "ltx2_core.transformer": BASE | {"kernels", "ltx2_core.parallel.context"},
    "ltx2_core.vae": BASE | {"kernels", "ltx2_core.parallel.bands"},
    "nodes": {"ltx2_core"},
    "cli": {"ltx2_core", "nodes"},
    "__init__": {"nodes"},
}

COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview"}
COMFYUI |= {"nodes", "node_helpers", "server"}
HEAVY = {"av", "numpy", "PIL", "ray", "safetensors", "torch", "tqdm", "transformers", "yaml"}
BANNED = {
    **dict.fromkeys(("pickle", "dill", "marshal", "shelve", "joblib", "torch.load", "torch.save"), "pickled files"),
    **dict.fromkeys(("cloudpickle", "_pickle", "torch.serialization"), "pickled files"),
    **dict.fromkeys(("socket", "ssl", "urllib", "http", "requests", "httpx", "ftplib", "smtplib"), "the network"),
    **dict.fromkeys(("subprocess", "multiprocessing", "os.system", "os.popen", "pty"), "processes"),
    **dict.fromkeys(("eval", "exec", "compile", "__import__", "importlib", "runpy", "code"), "code made at run time"),
    "ctypes": "foreign code",
    "torch.distributed": "process groups",
    "torch.multiprocessing": "processes",
    "ray": "a cluster",
    "triton": "Triton",
}

PICKLING_COLLECTIVE = re.compile(r"(all_gather|broadcast|gather|scatter|send|recv)_object(_list)?")


# reading one file ----------------------------------------------------------------------------------------------------


def dotted(path: Path) -> str:
    """A file's module name below the pack's root; a package's is that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def within(name: str, units: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{unit}.") for unit in units)


def unit_of(module: str) -> str:
    return max((unit for unit in MAY_IMPORT if within(module, {unit})), key=len)


def holds_kernels(module: str) -> bool:
    """Whether the module holds kernels in Triton's language."""
    return within(module, {"kernels"}) and module.endswith("_triton")


def may_use(module: str, banned: str) -> bool:
    """Whether the module is one of the few that a ban leaves out."""
    return (banned == "triton" and holds_kernels(module)) or module in ALLOWED.get(banned, ())


def relative_imports(path: Path, tree: ast.AST) -> set[str]:
    """Modules of the pack that the source imports."""
    here = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level], *filter(None, (node.module or "").split(".")))
            for alias in node.names:
                named = ROOT.joinpath(*base, alias.name)
                is_module = named.with_suffix(".py").exists() or named.is_dir()
                found.add(".".join((*base, alias.name) if is_module else base))
    return found


def absolute_imports(tree: ast.AST) -> set[str]:
    """Modules from outside the pack that the source imports, with the names taken from them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def used_names(tree: ast.AST) -> set[str]:
    """Plain names that are called, and dotted names such as ``torch.load``."""
    found = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return found | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def at_module_level(tree: ast.Module) -> ast.Module:
    """The source without function bodies and without what only type checkers read."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return ast.fix_missing_locations(Strip().visit(tree))


def pickling_collectives(tree: ast.AST) -> set[str]:
    """Names such as ``broadcast_object_list``: they pickle what they exchange."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return {name for name in names if PICKLING_COLLECTIVE.fullmatch(name)}


def violations(path: Path, source: str) -> list[str]:
    """What a file of the pack does that its place does not allow."""
    tree, module = ast.parse(source), dotted(path)
    unit = unit_of(module)
    found = [
        f"{unit} may not import {target}"
        for target in sorted(relative_imports(path, tree))
        if not within(target, {unit, *MAY_IMPORT[unit]})
    ]
    outside, used = absolute_imports(tree), used_names(tree)
    found += [
        f"{name}: {BANNED[banned]} is not for the pack"
        for name in sorted(outside | used)
        for banned in BANNED
        if within(name, {banned}) and not may_use(module, banned)
    ]
    found += [f"{name}: pickled messages are not for the pack" for name in sorted(pickling_collectives(tree))]
    own = {name for name in outside if within(name, {*FOLDERS, "ltx2_engine"})}
    if module not in PLACE_THE_PACK:
        found += [f"{name}: the pack imports itself relatively" for name in sorted(own)]
    top = at_module_level(ast.parse(source))
    loaded = absolute_imports(top)
    if not holds_kernels(module):
        # without Triton the pack works all the same
        found += [
            f"{name}: kernels are imported in functions" for name in relative_imports(path, top) if holds_kernels(name)
        ]
    hosts = {name for name in outside if within(name, COMFYUI)} if unit != "cli" else set()
    if module == "nodes.host":
        hosts &= loaded
    found += [f"{name}: only functions of nodes/host.py talk to ComfyUI" for name in sorted(hosts)]
    if module in ("__init__", "cli") or unit == "nodes" or unit in BASE:
        found += [f"{name}: heavy at module level" for name in sorted(loaded) if within(name, HEAVY)]
        reached = relative_imports(path, top)
        free = BASE | {"nodes"}
        found += [f"{name}: not torch-free at module level" for name in sorted(reached) if not within(name, free)]
    return found


# the pack ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_keeps_the_layout(path):
    source = path.read_text(encoding="utf-8")
    assert violations(path, source) == []
    assert len(source.splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("place", "source", "message"),
    [
        ("kernels/x.py", "from ..ltx2_core.av import AV", "kernels may not import ltx2_core.av"),
        ("ltx2_core/sampling/x.py", "from ..transformer.model import Transformer", "may not import ltx2_core.transf"),
        ("ltx2_core/vae/x.py", "def f():\n from ..engine import open_engine", "may not import ltx2_core.engine"),
        ("ltx2_core/text/x.py", "from ... import nodes", "may not import nodes"),
        ("ltx2_core/x.py", "from ..nodes.host import ComfyHost", "ltx2_core may not import nodes.host"),
        ("nodes/x.py", "from ..kernels.rotary import apply_split_rotary", "nodes may not import kernels.rotary"),
        ("nodes/x.py", "from ..ltx2_core.engine import open_engine", "not torch-free at module level"),
        ("nodes/x.py", "import torch", "torch: heavy at module level"),
        ("nodes/x.py", "class A:\n import numpy as np", "numpy: heavy at module level"),
        ("ltx2_core/presets.py", "from torch import Tensor", "torch.Tensor: heavy at module level"),
        ("ltx2_core/config/x.py", "from ..engine import open_engine", "may not import ltx2_core.engine"),
        ("nodes/x.py", "def f():\n import folder_paths", "only functions of nodes/host.py"),
        ("nodes/host.py", "import comfy.utils", "only functions of nodes/host.py"),
        ("ltx2_core/x.py", "from comfy.utils import ProgressBar", "only functions of nodes/host.py"),
        ("ltx2_core/x.py", "import nodes", "only functions of nodes/host.py"),
        ("ltx2_core/x.py", "import kernels.rotary", "the pack imports itself relatively"),
        ("ltx2_core/x.py", "from ltx2_engine.kernels import rotary", "the pack imports itself relatively"),
        ("ltx2_core/x.py", "import pickle", "pickle: pickled files"),
        ("ltx2_core/x.py", "import torch\ntorch.load('x')", "torch.load: pickled files"),
        ("ltx2_core/x.py", "from torch import load", "torch.load: pickled files"),
        ("ltx2_core/x.py", "eval('1')", "eval: code made at run time"),
        ("ltx2_core/x.py", "from importlib import import_module", "importlib.import_module: code made at run time"),
        ("ltx2_core/x.py", "def f():\n from urllib.request import urlopen", "urllib.request.urlopen: the network"),
        ("ltx2_core/x.py", "import http.client", "http.client: the network"),
        ("nodes/x.py", "import subprocess", "subprocess: processes"),
        ("nodes/x.py", "import os\nos.system('ls')", "os.system: processes"),
        ("ltx2_core/x.py", "import multiprocessing.shared_memory", "multiprocessing.shared_memory: processes"),
        ("ltx2_core/x.py", "import torch.distributed as dist", "torch.distributed: process groups"),
        ("ltx2_core/x.py", "import torch\ntorch.distributed.get_rank()", "torch.distributed: process groups"),
        ("ltx2_core/parallel/context.py", "import torch.distributed as dist", "torch.distributed: process groups"),
        ("ltx2_core/parallel/collectives.py", "import torch.multiprocessing", "torch.multiprocessing: processes"),
        ("ltx2_core/parallel/context.py", "from ..transformer.rope import Rotary", "may not import ltx2_core.transf"),
        ("ltx2_core/vae/x.py", "from ..parallel.collectives import join", "may not import ltx2_core.parallel.coll"),
        ("ltx2_core/x.py", "import subprocess", "subprocess: processes"),
        ("ltx2_core/parallel/worker_process.py", "import socket", "socket: the network"),
        ("ltx2_core/parallel/worker_process.py", "import ctypes", "ctypes: foreign code"),
        ("ltx2_core/parallel/processes.py", "import multiprocessing", "multiprocessing: processes"),
        (
            "ltx2_core/parallel/helix_collectives.py",
            "import torch.distributed as dist\ndist.broadcast_object_list([])",
            "broadcast_object_list: pickled messages",
        ),
        (
            "ltx2_core/parallel/helix_collectives.py",
            "from torch.distributed import all_gather_object",
            "all_gather_object: pickled messages",
        ),
        ("nodes/runner/ray_nodes.py", "def f():\n import ray", "ray: a cluster"),
        ("nodes/runner/ray_cluster.py", "import ray", "ray: heavy at module level"),
        ("nodes/x.py", "def f():\n from ray.util import placement_group", "ray.util.placement_group: a cluster"),
        ("kernels/x.py", "import triton.language as tl", "triton.language: Triton"),
        ("ltx2_core/x_triton.py", "import triton", "triton: Triton"),
        (
            "kernels/x.py",
            "from .rotary_triton import launch",
            "kernels.rotary_triton: kernels are imported in functions",
        ),
    ],
)
def test_planted_violations_are_caught(place, source, message):
    assert any(message in found for found in violations(ROOT / place, source))


def test_functions_of_the_host_may_import_comfyui():
    source = "from __future__ import annotations\ndef f():\n    import folder_paths\n    import torch\n"
    assert violations(ROOT / "nodes" / "host.py", source) == []


def test_files_of_kernels_may_import_triton_and_functions_may_import_them():
    assert violations(ROOT / "kernels" / "x_triton.py", "import triton\nfrom .rotary_triton import launch") == []
    assert violations(ROOT / "kernels" / "x.py", "def f():\n    from .rotary_triton import launch") == []


def test_sockets_are_connected_pairs():
    for module in ALLOWED["socket"]:
        tree = ast.parse(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert names.isdisjoint({"accept", "bind", "connect", "create_connection", "create_server", "listen"})
        assert names.isdisjoint({"AF_INET", "AF_INET6"})


def test_every_unit_of_the_table_exists():
    for unit in set(MAY_IMPORT) | set().union(*MAY_IMPORT.values()):
        path = ROOT.joinpath(*unit.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), unit


# the lists -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_wheel_lists_every_package(project):
    setuptools = project["tool"]["setuptools"]
    assert setuptools["package-dir"] == {"ltx2_engine": "."}
    folders = {path.parent.relative_to(ROOT) for path in FILES}
    assert set(setuptools["packages"]) == {".".join(("ltx2_engine", *folder.parts)) for folder in folders}
    missing = [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()]
    assert missing == [], "folders without __init__.py"


def test_requirements_are_the_projects_dependencies(project):
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert listed == project["project"]["dependencies"]
    assert "torch" in listed, "torch has no version: the host brings its own build"


def test_every_dependency_is_pinned_for_the_demo(project):
    pins = (ROOT / "requirements" / "demo.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0] for line in pins if "==" in line}
    assert {name.partition(">")[0] for name in project["project"]["dependencies"]} <= pinned
