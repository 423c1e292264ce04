"""The pack as ComfyUI and registries load it: from any folder name, with the standard library only, at once."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for path in sorted(ROOT.rglob("*.py")) if not path.relative_to(ROOT).parts[0].startswith((".", "build"))]

# how ComfyUI loads a pack: by path, under a name that is the path; -S leaves out everything that is installed
LOAD = """
import importlib.util, json, os, sys, time

def load(folder):
    name = folder.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(
        name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


def run(script: str, *arguments: object) -> dict:
    """What a bare interpreter prints as JSON after running the script."""
    command = [sys.executable, "-I", "-S", "-c", LOAD + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_is_quick_and_loads_the_standard_library_only():
    script = """
start = time.perf_counter()
pack = load(sys.argv[1])
seconds = time.perf_counter() - start
foreign = sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))
print(json.dumps({"seconds": seconds, "foreign": foreign, "nodes": list(pack.NODE_CLASS_MAPPINGS)}))
"""
    results = [run(script, ROOT) for _ in range(5)]
    own = {"__main__", "ltx2_engine", str(ROOT).replace(".", "_x_").partition(".")[0]}
    assert set(results[0]["foreign"]) <= own
    assert "LTX2LoadModel" in results[0]["nodes"]
    assert min(result["seconds"] for result in results) < 0.1


@pytest.mark.parametrize("name", ["my packs", "ltx2-engine-0.1.0", "ComfyUI.LTX2 (copy)"])
def test_any_folder_name_will_do(tmp_path, name):
    link = tmp_path / name
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        pytest.skip("this system does not let the user make links")
    script = """
pack = load(sys.argv[1])
module = pack.NODE_CLASS_MAPPINGS["LTX2LoadModel"].__module__
print(json.dumps({"module": module, "names": list(pack.NODE_DISPLAY_NAME_MAPPINGS), "web": pack.WEB_DIRECTORY}))
"""
    found = run(script, link)
    assert found["module"] == "ltx2_engine.nodes.load"
    assert "LTX2Sampler" in found["names"]
    assert found["web"] == "./web"


def test_a_second_copy_in_the_process_keeps_its_own_nodes(tmp_path):
    copy = tmp_path / "copy"
    for path in [ROOT / "__init__.py", *(p for top in ("nodes", "ltx2_core") for p in (ROOT / top).rglob("*.py"))]:
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    script = """
packs = [load(folder) for folder in sys.argv[1:]]
classes = [pack.NODE_CLASS_MAPPINGS["LTX2Sampler"] for pack in packs]
files = [sys.modules[c.__module__].__file__ for c in classes]
print(json.dumps({"same": classes[0] is classes[1], "files": files, "modules": [c.__module__ for c in classes]}))
"""
    found = run(script, ROOT, copy)
    assert not found["same"]
    assert found["modules"][0] == "ltx2_engine.nodes.sample"
    assert [Path(file).parent for file in found["files"]] == [ROOT / "nodes", copy / "nodes"]


def test_folders_of_the_pack_do_not_shadow_other_modules():
    script = """
import importlib.util
load(sys.argv[1])
places = {name: importlib.util.find_spec(name) for name in ("nodes", "kernels", "tests", "ltx2_core", "cli")}
print(json.dumps({name: spec and spec.origin for name, spec in places.items()}))
"""
    assert run(script, ROOT) == dict.fromkeys(("nodes", "kernels", "tests", "ltx2_core", "cli"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_is_python_3_10(path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
