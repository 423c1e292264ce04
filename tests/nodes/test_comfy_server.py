"""The pack in ComfyUI's server and in the browser, on CPU with tiny models.

Needs a ComfyUI tree (COMFYUI_PATH), an interpreter for it (COMFYUI_PYTHON), and for the browser tests playwright and a
Chromium or Chrome on the path (or in CHROMIUM).
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ltx2_engine.nodes import NODE_CLASS_MAPPINGS
from ltx2_engine.nodes.runner.schema import inputs_of

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
SAMPLER = "7"  # in the workflow that is interrupted
START_SECONDS = 120
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]

pytestmark = pytest.mark.comfy


class Server:
    """A running ComfyUI server: its address and its log."""

    def __init__(self, url: str, log: Path):
        self.url, self.log = url, log

    def get(self, path: str) -> bytes:
        # no proxy: the server is on this machine
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=20) as response:
            return response.read()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))


@pytest.fixture(scope="module")
def server(
    comfy_python: str, comfy_tree: Path, comfy_environment: dict, comfy_base: Path, tmp_path_factory
) -> Iterator[Server]:
    needs = subprocess.run([comfy_python, "-c", "import torch, aiohttp, comfyui_frontend_package"], check=False)
    if needs.returncode:
        pytest.skip(f"{comfy_python} lacks ComfyUI's requirements (set COMFYUI_PYTHON)")
    # a user whom the interface does not greet with a dialog
    settings = comfy_base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [comfy_python, str(comfy_tree / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--disable-api-nodes", "--base-directory", str(comfy_base), "--database-url", "sqlite:///:memory:"]
    running = Server(f"http://127.0.0.1:{port}", log)
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=comfy_environment, cwd=log.parent
        )
    try:
        wait_until_up(running, process)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_up(server: Server, process: subprocess.Popen) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, server.log.read_text()[-4000:]
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            server.get("/queue")
            return
        time.sleep(0.2)
    raise AssertionError(f"the server did not start in {START_SECONDS} s: {server.log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def runs(server: Server, comfy_script: Callable[..., dict], tiny_prompt: Callable[..., dict], tmp_path_factory) -> dict:
    """What the server said to every workflow, to one that was interrupted, and to one after it."""
    long = tiny_prompt("text_to_video", LTX2Sigmas={"schedule": "ltx-2", "steps": 1000})
    after = tiny_prompt("text_to_video", LTX2Sampler={"seed": 11})
    jobs = {
        **{name: {"prompt": tiny_prompt(name), "interrupt": None} for name in NAMES},
        "interrupted": {"prompt": long, "interrupt": SAMPLER},
        "after": {"prompt": after, "interrupt": None},
    }
    file = tmp_path_factory.mktemp("prompts") / "prompts.json"
    file.write_text(json.dumps(list(jobs.values())))
    answered = comfy_script("server_checks.py", server.url, file)
    return dict(zip(jobs, answered["runs"], strict=True))


def test_pack_loads_without_complaint(server: Server):
    log = server.log.read_text()
    assert "custom_nodes/ltx2-engine" in log
    assert "IMPORT FAILED" not in log
    assert "Cannot import" not in log


def test_every_node_is_offered_with_its_inputs(server: Server):
    offered = server.json("/object_info")
    for name, node in NODE_CLASS_MAPPINGS.items():
        inputs = offered[name]["input"]
        assert [*inputs.get("required", {}), *inputs.get("optional", {})] == list(inputs_of(node))
        assert offered[name]["python_module"] == "custom_nodes.ltx2-engine"


def test_templates_and_thumbnails_are_served(server: Server):
    assert sorted(server.json("/workflow_templates")["ltx2-engine"]) == NAMES
    for name in NAMES:
        for suffix in ("json", "jpg"):
            served = server.get(f"/api/workflow_templates/ltx2-engine/{name}.{suffix}")
            assert served == (ROOT / "workflows" / f"{name}.{suffix}").read_bytes()


def test_extension_and_help_pages_are_served(server: Server):
    assert "/extensions/ltx2-engine/ltx2_engine.js" in server.json("/extensions")
    for name in NODE_CLASS_MAPPINGS:
        assert server.get(f"/extensions/ltx2-engine/docs/{name}.md").startswith(b"# LTX-2 ")


def test_an_enhanced_prompt_is_shown(server: Server, comfy_script: Callable, tiny_prompt: Callable, tmp_path: Path):
    load = next(node for node in tiny_prompt("text_to_video").values() if node["class_type"] == "LTX2LoadModel")
    inputs = {"model": ["1", 0], "prompt": "a fox", "seed": 1, "max_new_tokens": 24}
    prompt = {"1": load, "2": {"class_type": "LTX2EnhancePrompt", "inputs": inputs}}
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": prompt, "interrupt": None}]))
    [run] = comfy_script("server_checks.py", server.url, tmp_path / "prompts.json")["runs"]
    assert run["history"] == "success"
    [text] = run["outputs"]["2"]["text"]
    assert any(c.isalnum() for c in text)
    value, most = run["bars"]["2"][-1]
    assert 1 <= value <= most


@pytest.mark.parametrize("name", NAMES)
def test_workflow_runs_to_success(name: str, runs: dict, comfy_base: Path):
    run = runs[name]
    assert (run["ended"], run["history"]) == ("execution_success", "success"), run
    shown = [file for output in run["outputs"].values() for files in output.values() for file in files]
    (saved,) = [file for file in shown if isinstance(file, dict) and file["type"] == "output"]
    assert (comfy_base / "output" / saved["subfolder"] / saved["filename"]).stat().st_size > 1000


@pytest.mark.parametrize("name", NAMES)
def test_progress_of_sampling_reaches_its_maximum(name: str, runs: dict, tiny_prompt: Callable[..., dict]):
    for key, node in tiny_prompt(name).items():
        if node["class_type"] == "LTX2Sampler":
            value, most = runs[name]["bars"][key][-1]
            assert value == most >= 2


def test_interrupt_stops_sampling_between_steps(runs: dict):
    run = runs["interrupted"]
    assert (run["ended"], run["history"]) == ("execution_interrupted", "error")
    assert "execution_interrupted" in run["messages"]
    steps = [value for value, most in run["bars"][SAMPLER] if most == 1000]
    assert 0 < max(steps) < 1000
    assert run["stop_seconds"] < 3


def test_the_prompt_after_an_interrupt_runs(runs: dict):
    assert runs["after"]["history"] == "success"


# in the browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = (shutil.which(name) for name in (os.environ.get("CHROMIUM", ""), *BROWSERS) if name)
    browser_path = next((path for path in found if path), None)
    if browser_path is None:
        pytest.skip("no Chromium on the path (set CHROMIUM)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=QUIET)
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.goto(server.url)
        # the interface ends its start by loading a workflow of its own
        page.wait_for_function(
            "window.app?.graph?.nodes.length > 0 && 'LTX2Guider' in LiteGraph.registered_node_types", timeout=60_000
        )
        yield page
        browser.close()


def load(page: Any, workflow: dict) -> None:
    page.evaluate("workflow => app.loadGraphData(workflow, true, true)", workflow)
    shown = page.evaluate(
        "app.graph.nodes.map((node) => [Number(node.id), node.type, node.type in LiteGraph.registered_node_types])"
    )
    assert sorted(shown) == sorted([node["id"], node["type"], True] for node in workflow["nodes"])


def widget_values(page: Any, node_type: str) -> dict:
    return page.evaluate(
        "type => Object.fromEntries(app.graph.nodes.find(n => n.type === type).widgets.map(w => [w.name, w.value]))",
        node_type,
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_browser_makes_the_api_file_of_the_workflow(name: str, page: Any):
    load(page, json.loads((ROOT / "workflows" / f"{name}.json").read_text()))
    made = page.evaluate("app.graphToPrompt().then(prompt => prompt.output)")
    for node in made.values():
        node["inputs"].pop("video-preview", None)  # the player, where the browser has shown it by then
    assert made == json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())


@pytest.mark.parametrize(("node_type", "preset"), [("LTX2Guider", "preset"), ("LTX2SelectSampler", "sampler")])
def test_choosing_a_preset_fills_the_numbers(node_type: str, preset: str, page: Any):
    page.evaluate(
        """type => {
            app.graph.clear();
            const node = LiteGraph.createNode(type);
            app.graph.add(node);
            node.pos = [400, 200];
            Object.assign(app.canvas.ds, { scale: 1, offset: [0, 0] });
            app.canvas.draw(true, true);
        }""",
        node_type,
    )
    place = page.evaluate(
        """name => {
            const [node] = app.graph.nodes;
            const { x, y } = app.canvas.canvas.getBoundingClientRect();
            const widget = node.widgets.find((widget) => widget.name === name);
            return [x + node.pos[0] + node.size[0] / 2, y + node.pos[1] + (widget.last_y ?? widget.y) + 10];
        }""",
        preset,
    )
    before = widget_values(page, node_type)
    fills = inputs_of(NODE_CLASS_MAPPINGS[node_type])[preset].options["ltx2_fills"]
    for option, values in reversed(fills.items()):
        page.mouse.click(*place)
        page.locator(".litemenu-entry").get_by_text(option, exact=True).first.click()
        page.wait_for_function("option => app.graph.nodes[0].widgets[0].value === option", arg=option)
        assert widget_values(page, node_type) == {**before, preset: option, **values}


@pytest.mark.parametrize("as_api", [False, True])
def test_a_loaded_workflow_keeps_its_own_numbers(as_api: bool, page: Any):
    load(page, json.loads((ROOT / "workflows" / "text_to_video.json").read_text()))
    page.evaluate(
        """() => {
            const { widgets } = app.graph.nodes.find((node) => node.type === "LTX2Guider");
            const set = (name, value) => (widgets.find((widget) => widget.name === name).value = value);
            set("preset", "guided 2.0"); set("video_cfg", 5.5); set("stg_blocks", "27, 29");
            const solver = app.graph.nodes.find((node) => node.type === "LTX2SelectSampler");
            const choose = (name, value) => (solver.widgets.find((widget) => widget.name === name).value = value);
            choose("sampler", "res_2s"); choose("eta", 0.25);
        }"""
    )
    saved = widget_values(page, "LTX2Guider")
    solver = widget_values(page, "LTX2SelectSampler")
    assert (saved["preset"], saved["video_cfg"], saved["audio_cfg"]) == ("guided 2.0", 5.5, 1)
    assert (solver["sampler"], solver["eta"], solver["noise_kind"]) == ("res_2s", 0.25, "plain")
    if as_api:
        prompt = page.evaluate("app.graphToPrompt().then(prompt => prompt.output)")
        page.evaluate("() => app.graph.clear()")
        page.evaluate("prompt => app.loadApiJson(prompt, 'saved')", prompt)
        page.wait_for_function("app.graph.nodes.length > 5")
    else:
        load(page, page.evaluate("app.graph.serialize()"))
    assert widget_values(page, "LTX2Guider") == saved
    assert widget_values(page, "LTX2SelectSampler") == solver
