"""The workflows that the pack ships: readable, valid, equal in both formats, and running."""

import itertools
import json
import types
from pathlib import Path

import av
import pytest
from ltx2_engine import cli
from ltx2_engine.ltx2_core.host import StandaloneHost, use_host
from ltx2_engine.ltx2_core.tiny import checkpoint_file, write_tiny_set
from ltx2_engine.nodes import NODE_CLASS_MAPPINGS as OURS
from ltx2_engine.nodes import NODE_DISPLAY_NAME_MAPPINGS
from ltx2_engine.nodes.runner.core_nodes import CORE_NODES
from ltx2_engine.nodes.runner.execute import execute
from ltx2_engine.nodes.runner.options import apply_settings
from ltx2_engine.nodes.runner.schema import inputs_of
from ltx2_engine.nodes.runner.validate import validate

ROOT = Path(cli.__file__).resolve().parent
FOLDER = ROOT / "workflows"
DOCS = ROOT / "web" / "docs"
NAMES = ("image_to_video", "text_to_video")
CHECKPOINT, TEXT_ENCODER = "ltx-2.3-22b-distilled.safetensors", "gemma-3-12b-it-qat-q4_0-unquantized"
TITLE_BAR = 30
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3", "IMAGEUPLOAD")

# what ComfyUI 0.33.0 declares for its own nodes, as the frontend shows them: inputs, then outputs
CORE = {
    "LoadImage": ({"image": "COMBO", "upload": "IMAGEUPLOAD"}, ("IMAGE", "MASK")),
    "CreateVideo": ({"images": "IMAGE", "fps": "FLOAT", "audio": "AUDIO", "bit_depth": "INT"}, ("VIDEO",)),
    "SaveVideo": (
        {
            "video": "VIDEO",
            "filename_prefix": "STRING",
            "format": "COMFY_DYNAMICCOMBO_V3",
            "format.codec": "COMFY_DYNAMICCOMBO_V3",
            "codec": "COMFY_DYNAMICCOMBO_V3",
        },
        ("VIDEO",),
    ),
}
NOTES = ("Note", "MarkdownNote")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ui(name: str) -> dict:
    return read(FOLDER / f"{name}.json")


@pytest.fixture
def api(name: str) -> dict:
    return read(FOLDER / "api" / f"{name}.json")


def declared(node_type: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Input name to type in declared order, and the output types."""
    if node_type in CORE:
        return CORE[node_type]
    node = OURS[node_type]
    return {name: field.type for name, field in inputs_of(node).items()}, node.RETURN_TYPES


def widgets(node: dict) -> dict:
    """Widget values by name, read from the list by position: a seed is followed by its control."""
    if node["type"] in NOTES:
        return dict(zip(["text"], node["widgets_values"], strict=True))
    names = []
    for name, kind in declared(node["type"])[0].items():
        names += [name] if kind in WIDGET_TYPES else []
        names += ["control_after_generate"] if name == "seed" else []
    return dict(zip(names, node["widgets_values"], strict=True))


def to_api(ui: dict) -> dict:
    """What the frontend sends to run a workflow without muted, bypassed or sub-graph nodes."""
    assert all(node["mode"] == 0 for node in ui["nodes"])
    origins = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    prompt = {}
    for node in ui["nodes"]:
        if node["type"] in NOTES:
            continue
        kinds = declared(node["type"])[0]
        links = {slot["name"]: origins[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        constants = {name: v for name, v in widgets(node).items() if kinds.get(name, "IMAGEUPLOAD") != "IMAGEUPLOAD"}
        title = node.get("title") or {"CreateVideo": "Create Video", "SaveVideo": "Save Video"}[node["type"]]
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": {**constants, **links},
            "_meta": {"title": title},
        }
    return prompt


def test_the_folder_offers_exactly_the_workflows():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == list(NAMES)
    assert sorted(path.stem for path in (FOLDER / "api").glob("*.json")) == list(NAMES)
    others = ("example_workflows", "example", "examples", "workflow")
    assert [folder for folder in others if (ROOT / folder).exists()] == [], "ComfyUI serves one such folder only"


def test_both_formats_mean_the_same(ui: dict, api: dict):
    assert to_api(ui) == api


def test_widgets_have_the_same_values_by_name_and_by_position(ui: dict):
    for node in ui["nodes"]:
        assert node["widgets_values_named"] == widgets(node), node["type"]


def test_slots_are_those_the_nodes_declare(ui: dict):
    for node in ui["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs, outputs = declared(node["type"])
        assert {slot["name"]: slot["type"] for slot in node["inputs"]} == inputs, node["type"]
        assert tuple(slot["type"] for slot in node["outputs"]) == outputs, node["type"]
        assert {slot["name"] for slot in node["inputs"] if "widget" in slot} == {
            name for name, kind in inputs.items() if kind in WIDGET_TYPES
        }


def test_links_agree_at_both_ends(ui: dict):
    nodes = {node["id"]: node for node in ui["nodes"]}
    assert len(nodes) == len(ui["nodes"])
    assert ui["last_node_id"] == max(nodes)
    assert [link[0] for link in ui["links"]] == list(range(1, ui["last_link_id"] + 1))
    for link, source, out_slot, target, in_slot, kind in ui["links"]:
        output, entry = nodes[source]["outputs"][out_slot], nodes[target]["inputs"][in_slot]
        assert output["type"] == entry["type"] == kind
        assert link in output["links"]
        assert entry["link"] == link
    ends = [slot["link"] for node in ui["nodes"] for slot in node["inputs"] if slot["link"] is not None]
    starts = [link for node in ui["nodes"] for slot in node["outputs"] for link in slot["links"]]
    assert sorted(ends) == sorted(starts) == [link[0] for link in ui["links"]]


def test_values_are_legal_with_the_named_files_in_place(api: dict, tmp_path: Path):
    encoder = tmp_path / "models" / "text_encoders" / TEXT_ENCODER
    for path in (
        tmp_path / "models" / "checkpoints" / CHECKPOINT,
        encoder / "model.safetensors",
        encoder / "config.json",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "example.png").touch()
    host = StandaloneHost([tmp_path / "models"], tmp_path / "input", tmp_path, progress="quiet")
    nodes = {**CORE_NODES, **OURS}
    with use_host(host):
        assert validate(api, nodes) == api
        for preset in ("guided 2.0", "guided 2.3/2.5"):
            guided = apply_settings(api, nodes, [f"Guider.preset={preset}", "Noise levels.schedule=ltx-2"])
            assert validate(guided, nodes)["4"]["inputs"]["audio_cfg"] == 7.0


def frame(node: dict) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, the title bar included."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_BAR, x + width, y + height


def apart(a: tuple, b: tuple) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_nothing_overlaps_and_every_node_lies_in_one_group(ui: dict):
    nodes = [frame(node) for node in ui["nodes"]]
    groups = [(x, y, x + width, y + height) for x, y, width, height in (group["bounding"] for group in ui["groups"])]
    assert all(apart(a, b) for rectangles in (nodes, groups) for a, b in itertools.combinations(rectangles, 2))
    for node in nodes:
        inside = [
            g for g in groups if g[0] < node[0] and g[1] + TITLE_BAR < node[1] and g[2] > node[2] and g[3] > node[3]
        ]
        assert len(inside) == 1
    assert [group["title"].split()[0] for group in ui["groups"]] == ["1", "2", "3", "4", "5"]


def test_nodes_say_which_pack_they_come_from(ui: dict):
    version = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version = "))
    for node in ui["nodes"]:
        properties = node["properties"]
        if node["type"] in OURS:
            assert (properties["cnr_id"], f'version = "{properties["ver"]}"') == ("ltx2-engine", version)
        else:
            assert properties["cnr_id"] == "comfy-core"


def test_the_note_names_every_file_and_its_folder(ui: dict):
    (note,) = [node["widgets_values"][0] for node in ui["nodes"] if node["type"] == "MarkdownNote"]
    (load,) = [widgets(node) for node in ui["nodes"] if node["type"] == "LTX2LoadModel"]
    assert (load["checkpoint"], load["text_encoder"]) == (CHECKPOINT, TEXT_ENCODER)
    for text in (CHECKPOINT, TEXT_ENCODER, "models/checkpoints/", "models/text_encoders/", "Lightricks/LTX-2.3"):
        assert text in note
    assert ("`input/`" in note) == any(node["type"] == "LoadImage" for node in ui["nodes"])
    presets = inputs_of(OURS["LTX2Guider"])["preset"].choices
    assert all(f"`{preset}`" in note for preset in presets if preset != "distilled")


def test_each_workflow_has_a_small_thumbnail(name: str):
    from PIL import Image

    path = FOLDER / f"{name}.jpg"
    assert path.stat().st_size < 60_000
    with Image.open(path) as picture:
        assert (picture.format, picture.width) == ("JPEG", 512)


@pytest.mark.parametrize("node_id", OURS)
def test_each_node_has_a_help_page_that_names_its_inputs(node_id: str):
    page = (DOCS / f"{node_id}.md").read_text()
    assert page.startswith(f"# {NODE_DISPLAY_NAME_MAPPINGS[node_id]}\n")
    assert [name for name in declared(node_id)[0] if name not in page] == []


def test_help_pages_belong_to_nodes():
    assert {path.stem for path in DOCS.glob("*.md")} == set(OURS)


def test_the_browser_fills_what_the_command_line_fills():
    guider = OURS["LTX2Guider"]
    inputs = inputs_of(guider)
    fills = inputs["preset"].options["ltx2_fills"]
    assert list(fills) == inputs["preset"].choices
    assert all(guider.fill("preset", option) == values for option, values in fills.items())
    assert all(set(values) <= set(inputs) for values in fills.values())


def test_the_web_extension_has_no_network_code():
    (script,) = (ROOT / "web").rglob("*.js")
    text = script.read_text()
    forbidden = ("fetch", "http", ".connect(", "WebSocket", "import(", "eval(", "innerHTML")
    assert [word for word in forbidden if word in text] == []


# running ------------------------------------------------------------------------------------------------------------

TINY = {"LTX2LoadModel.checkpoint": checkpoint_file("2.3"), "LTX2LoadModel.text_encoder": "gemma-3-tiny"}
SMALL = {"LTX2EmptyLatent.width": 64, "LTX2EmptyLatent.height": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for label in ("2.0", "2.3"):
        write_tiny_set(root, label)
    return root


@pytest.mark.parametrize(("flow", "frames", "fps"), [("text_to_video", 9, 24), ("image_to_video", 17, 25)])
def test_workflow_makes_a_video_with_sound_of_the_same_length(flow, frames, fps, models: Path, tmp_path: Path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "in" / "example.png")
    settings = {**TINY, **SMALL, "LTX2EmptyLatent.frames": frames, "LTX2EmptyLatent.fps": fps}
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    places = ["--models", str(models), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert cli.main(["run", str(FOLDER / "api" / f"{flow}.json"), *places, *options, "--quiet"]) == 0

    (file,) = (tmp_path / "out").rglob("*.mp4")
    with av.open(str(file)) as container:
        (video,), (audio,) = container.streams.video, container.streams.audio
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.width, video.height, video.average_rate) == (64, 64, fps)
        assert (audio.rate, audio.channels) == (48000, 2)
        assert sum(1 for _ in container.decode(video=0)) == frames
        container.seek(0)
        samples = sum(part.samples for part in container.decode(audio=0))
    assert abs(samples - frames / fps * 48000) <= 1024, "one AAC frame holds 1024 samples"


class Keep:
    """Keeps what its input carries."""

    RETURN_TYPES = ()
    FUNCTION = "execute"
    OUTPUT_NODE = True
    kept = {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"label": ("STRING", {}), "images": ("IMAGE", {}), "audio": ("AUDIO", {})}}

    @classmethod
    def execute(cls, label, images, audio):
        cls.kept[label] = types.SimpleNamespace(images=images, audio=audio)
        return ()


@pytest.mark.parametrize(("label", "rate", "hop"), [("2.0", 24000, 240), ("2.3", 48000, 480)])
def test_raw_sound_has_four_mel_frames_a_latent_less_three(label, rate, hop, models: Path, tmp_path: Path):
    """T = round(25 * frames / fps) latents become 4T - 3 mel frames of ``hop`` samples."""
    prompt = read(FOLDER / "api" / "text_to_video.json")
    clips = {"1": (1, 24.0), "9": (9, 24.0), "17": (17, 30.0), "33": (33, 50.0)}
    prompt["1"]["inputs"].update(checkpoint=checkpoint_file(label), text_encoder="gemma-3-tiny")
    prompt["5"]["inputs"]["schedule"] = "distilled stage 2"
    prompt = {key: node for key, node in prompt.items() if key not in ("9", "10")}
    for key, (frames, fps) in clips.items():
        copies = {node: {**prompt[node], "inputs": dict(prompt[node]["inputs"])} for node in ("3", "7", "8")}
        copies["3"]["inputs"].update(width=64, height=64, frames=frames, fps=fps)
        copies["7"]["inputs"]["latent"] = [f"3 {key}", 0]
        copies["8"]["inputs"]["latent"] = [f"7 {key}", 0]
        prompt.update({f"{node} {key}": copy for node, copy in copies.items()})
        links = {"images": [f"8 {key}", 0], "audio": [f"8 {key}", 1]}
        prompt[f"keep {key}"] = {"class_type": "Keep", "inputs": {"label": key, **links}}
    nodes = {**OURS, "Keep": Keep}
    host = StandaloneHost([models], tmp_path, tmp_path, progress="quiet")
    with use_host(host):
        execute(validate(prompt, nodes), nodes, host)
    for key, (frames, fps) in clips.items():
        latents = round(25 * frames / fps)
        kept = Keep.kept.pop(key)
        assert kept.audio["sample_rate"] == rate
        assert kept.audio["waveform"].shape == (1, 2, hop * (4 * latents - 3))
        assert kept.images.shape == (frames, 64, 64, 3)
