"""The workflows that the pack ships: readable, valid, equal in both formats, and running."""

import itertools
import json
import shlex
import types
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from ltx2_engine import cli
from ltx2_engine.ltx2_core.host import use_host
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.ltx2_core.tiny import checkpoint_file
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
NAMES = (
    "audio_to_video",
    "distilled_two_stage",
    "extend_video",
    "guided",
    "guided_two_stage",
    "hq_two_stage",
    "ic_lora",
    "image_to_video",
    "keyframe_interpolation",
    "retake",
    "text_to_audio",
    "text_to_video",
)
FILES = {  # (class, input) -> folder
    ("LTX2LoadModel", "checkpoint"): "models/checkpoints",
    ("LTX2LoadModel", "text_encoder"): "models/text_encoders",
    ("LTX2LoadLora", "lora"): "models/loras",
    ("LTX2UpscaleLatent", "upsampler"): "models/latent_upscale_models",
    ("LoadImage", "image"): "input",
    ("LoadVideo", "file"): "input",
    ("LoadAudio", "audio"): "input",
}
TITLE_BAR = 30
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
BROWSER_WIDGET_TYPES = ("IMAGEUPLOAD", "AUDIOUPLOAD", "AUDIO_UI")  # buttons and players, not sent to run

# what ComfyUI 0.33.0 declares for its own nodes, as the frontend shows them: inputs, then outputs
CORE = {
    "LoadImage": ({"image": "COMBO", "upload": "IMAGEUPLOAD"}, ("IMAGE", "MASK")),
    "LoadVideo": ({"file": "COMBO", "upload": "IMAGEUPLOAD"}, ("VIDEO",)),
    "LoadAudio": ({"audio": "COMBO", "audioUI": "AUDIO_UI", "upload": "AUDIOUPLOAD"}, ("AUDIO",)),
    "SaveAudio": ({"audio": "AUDIO", "filename_prefix": "STRING", "audioUI": "AUDIO_UI"}, ("AUDIO",)),
    "GetVideoComponents": ({"video": "VIDEO"}, ("IMAGE", "AUDIO", "FLOAT", "INT", "COMBO")),
    "ImageFromBatch": ({"image": "IMAGE", "batch_index": "INT", "length": "INT"}, ("IMAGE",)),
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
    """Widget values by name, read from the list by position: a seed is followed by its control, a player has none."""
    if node["type"] in NOTES:
        return dict(zip(["text"], node["widgets_values"], strict=True))
    names = []
    for name, kind in declared(node["type"])[0].items():
        names += [name] if kind in WIDGET_TYPES + BROWSER_WIDGET_TYPES else []
        names += ["control_after_generate"] if name == "seed" else []
    values = node.get("widgets_values", [])
    missing = names[len(values) :]
    assert missing in ([], ["audioUI"]), node["type"]
    return {name: value for name, value in zip(names, values, strict=False) if value is not None}


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
        constants = {name: v for name, v in widgets(node).items() if kinds.get(name) in WIDGET_TYPES}
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
        assert node.get("widgets_values_named", {}) == widgets(node), node["type"]


def test_slots_are_those_the_nodes_declare(ui: dict):
    for node in ui["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs, outputs = declared(node["type"])
        assert {slot["name"]: slot["type"] for slot in node["inputs"]} == inputs, node["type"]
        assert tuple(slot["type"] for slot in node["outputs"]) == outputs, node["type"]
        assert {slot["name"] for slot in node["inputs"] if "widget" in slot} == {
            name for name, kind in inputs.items() if kind in WIDGET_TYPES + BROWSER_WIDGET_TYPES
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


def files_of(api: dict) -> set[tuple[str, str]]:
    """(folder, name) of every file and folder that a workflow names."""
    return {
        (folder, node["inputs"][field])
        for (class_type, field), folder in FILES.items()
        for node in api.values()
        if node["class_type"] == class_type
    }


def test_values_are_legal_with_the_named_files_in_place(api: dict, tmp_path: Path):
    for folder, name in files_of(api):
        path = tmp_path / folder / name
        for file in (path / "config.json", path / "model.safetensors") if folder.endswith("encoders") else (path,):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    host = StandaloneHost([tmp_path / "models"], tmp_path / "input", tmp_path, progress="quiet")
    nodes = {**CORE_NODES, **OURS}
    with use_host(host):
        assert validate(api, nodes) == api
        for preset in ("guided 2.0", "guided 2.3/2.5"):
            guided = apply_settings(api, nodes, [f"Guider.preset={preset}", "Noise levels.schedule=ltx-2"])
            changed = next(node for node in validate(guided, nodes).values() if node["_meta"]["title"] == "Guider")
            assert changed["inputs"]["audio_cfg"] == 7.0


def test_titles_name_one_node_each(api: dict):
    """So that ``--set TITLE.input=value`` reaches every node."""
    titles = [node["_meta"]["title"] for node in api.values()]
    assert sorted(titles) == sorted(set(titles))
    assert [title for title in titles if "." in title] == []


# recipes ------------------------------------------------------------------------------------------------------------

DISTILLED_FILE, FULL_FILE = "ltx-2.3-22b-distilled.safetensors", "ltx-2.3-22b-dev.safetensors"
DISTILLED = ("distilled", "distilled", "euler", [])
GUIDED = ("guided 2.3/2.5", "ltx-2 30", "euler", [])
REFINED = ("distilled", "distilled stage 2", "euler", [])
WITH_LORA = ("distilled", "distilled stage 2", "euler", [("distilled", 1.0)])

# ltx-pipelines 1.2: checkpoint; preset, noise levels, solver and LoRAs of each stage; whose sound is delivered
RECIPES = {
    "text_to_video": (DISTILLED_FILE, [DISTILLED], "stage 1"),
    "image_to_video": (DISTILLED_FILE, [DISTILLED], "stage 1"),
    "extend_video": (DISTILLED_FILE, [DISTILLED], "stage 1"),
    "retake": (DISTILLED_FILE, [DISTILLED], "stage 1"),
    "distilled_two_stage": (DISTILLED_FILE, [DISTILLED, REFINED], "stage 2"),
    "ic_lora": (DISTILLED_FILE, [("distilled", "distilled", "euler", [("ic", 1.0)]), REFINED], "stage 2"),
    "guided": (FULL_FILE, [GUIDED], "stage 1"),
    "text_to_audio": (FULL_FILE, [GUIDED], "stage 1"),
    "guided_two_stage": (FULL_FILE, [GUIDED, WITH_LORA], "stage 1"),
    "keyframe_interpolation": (FULL_FILE, [GUIDED, WITH_LORA], "stage 2"),
    "audio_to_video": (FULL_FILE, [GUIDED, WITH_LORA], "input"),
    "hq_two_stage": (
        FULL_FILE,
        [
            ("hq", "ltx-2 15 by size", "res_2s", [("distilled", 0.25)]),
            ("distilled", "distilled stage 2", "res_2s", [("distilled", 0.5)]),
        ],
        "stage 1",
    ),
}
# where the numbers of a guider are not its preset's: the sound is given
OWN_NUMBERS = {"audio_to_video": {"audio_cfg": 1.0, "audio_stg": 0.0, "audio_modality": 1.0, "audio_rescale": 0.0}}


def source(api: dict, node: dict, field: str) -> dict:
    """The node that an input is linked to."""
    return api[node["inputs"][field][0]]


def samplers(api: dict) -> list[dict]:
    """The sampler of each stage, in order."""
    found = [node for node in api.values() if node["class_type"] == "LTX2Sampler"]
    return sorted(found, key=lambda node: "stage 2" in node["_meta"]["title"])


def loras(api: dict, model: dict) -> list[tuple[str, float]]:
    """The LoRAs of a model link, first loaded first, by what kind their file is."""
    if model["class_type"] == "LTX2LoadModel":
        return []
    inputs = model["inputs"]
    kind = {"distilled-lora-384": "distilled", "ic-lora-union-control": "ic"}[Path(inputs["lora"]).stem[12:]]
    return [*loras(api, source(api, model, "model")), (kind, inputs["strength"])]


def stage(api: dict, sampler: dict) -> tuple:
    """What RECIPES says of one stage."""
    guider, sigmas = source(api, sampler, "guider"), source(api, sampler, "sigmas")["inputs"]
    levels = sigmas["schedule"] if sigmas["schedule"] != "ltx-2" else f"ltx-2 {sigmas['steps']}"
    levels += " by size" if "latent" in sigmas else ""
    solver = source(api, sampler, "sampler")["inputs"]["sampler"]
    return guider["inputs"]["preset"], levels, solver, loras(api, source(api, guider, "model"))


def sound(api: dict) -> str:
    """Whose sound is delivered."""
    (last,) = [node for node in api.values() if node["class_type"] in ("CreateVideo", "SaveAudio")]
    node = source(api, last, "audio")
    if node["class_type"] == "LTX2KeepAudio":
        return "input"
    node = source(api, node, "latent")
    if node["class_type"] == "LTX2JoinStreams":
        assert source(api, node, "video_from") == samplers(api)[-1]
        node = source(api, node, "audio_from")
    return f"stage {samplers(api).index(node) + 1}"


def test_each_recipe_is_the_reference_pipelines(name: str, api: dict):
    (load,) = [node["inputs"] for node in api.values() if node["class_type"] == "LTX2LoadModel"]
    assert (load["checkpoint"], [stage(api, one) for one in samplers(api)], sound(api)) == RECIPES[name]


def test_numbers_are_those_of_the_chosen_presets(name: str, api: dict):
    for node in api.values():
        fill = getattr(OURS.get(node["class_type"]), "fill", None)
        filled = (
            {}
            if fill is None
            else {k: v for field, value in node["inputs"].items() for k, v in fill(field, value).items()}
        )
        if node["_meta"]["title"] == "Guider":
            filled |= OWN_NUMBERS.get(name, {})
        assert {key: node["inputs"][key] for key in filled} == filled, node["_meta"]["title"]


def test_conditions_of_stage_1_are_added_again_in_stage_2(name: str, api: dict):
    """Except the reference of an IC-LoRA, which stage 2 does not see."""

    def conditions(node: dict) -> list[str]:
        if node["class_type"] in ("LTX2EmptyLatent", "LTX2UpscaleLatent"):
            return []
        return [*conditions(source(api, node, "latent")), node["class_type"]]

    first, *second = (conditions(source(api, one, "latent")) for one in samplers(api))
    assert all(later == [one for one in first if one != "LTX2ReferenceVideo"] for later in second)


# on the canvas ------------------------------------------------------------------------------------------------------


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
    numbers = [int(group["title"].split()[0]) for group in ui["groups"]]
    assert numbers == list(range(1, len(numbers) + 1))


def test_nodes_say_which_pack_they_come_from(ui: dict):
    version = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version = "))
    for node in ui["nodes"]:
        properties = node["properties"]
        if node["type"] in OURS:
            assert (properties["cnr_id"], f'version = "{properties["ver"]}"') == ("ltx2-engine", version)
        else:
            assert properties["cnr_id"] == "comfy-core"


def test_the_note_names_every_file_and_its_folder(ui: dict, api: dict):
    (note,) = [node["widgets_values"][0] for node in ui["nodes"] if node["type"] == "MarkdownNote"]
    for folder, name in files_of(api):
        assert f"`{folder}/`" in note
        assert folder == "input" or f"`{name}`" in note
    assert ("`input/`" in note) == any(folder == "input" for folder, _ in files_of(api))


def test_the_note_says_how_to_use_another_checkpoint(name: str, ui: dict):
    (note,) = [node["widgets_values"][0] for node in ui["nodes"] if node["type"] == "MarkdownNote"]
    _, (first, *_), _ = RECIPES[name]
    titles = {node.get("title") for node in ui["nodes"]}
    if first[0] == "guided 2.3/2.5":
        assert "`guided 2.0`" in note
    if first[0] == "distilled" and "Negative prompt" in titles:
        assert "`guided 2.0`" in note
        assert "`guided 2.3/2.5`" in note


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


@pytest.mark.parametrize(("node_id", "field"), [("LTX2Guider", "preset"), ("LTX2SelectSampler", "sampler")])
def test_the_browser_fills_what_the_command_line_fills(node_id: str, field: str):
    node = OURS[node_id]
    inputs = inputs_of(node)
    fills = inputs[field].options["ltx2_fills"]
    assert list(fills) == inputs[field].choices
    assert all(node.fill(field, option) == values for option, values in fills.items())
    assert all(set(values) <= set(inputs) for values in fills.values())


def test_no_other_node_fills_widgets():
    filling = [name for name, node in OURS.items() for one in inputs_of(node).values() if "ltx2_fills" in one.options]
    assert filling == ["LTX2Guider", "LTX2SelectSampler"]
    assert [name for name, node in OURS.items() if hasattr(node, "fill")] == filling


@pytest.mark.parametrize("script", sorted((ROOT / "web").rglob("*.js")), ids=lambda script: script.name)
def test_the_web_extension_has_no_network_code(script):
    text = script.read_text()
    forbidden = ("fetch", "http", ".connect(", "WebSocket", "import(", "eval(", "innerHTML")
    assert [word for word in forbidden if word in text] == []


# running ------------------------------------------------------------------------------------------------------------

# width, height, frames of the finished clip: a second stage doubles the size
CLIPS = {name: (64 * len(stages), 64 * len(stages), 17) for name, (_, stages, _) in RECIPES.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def finished(name: str, results: Path, tiny_models: Path, example_inputs: Path, tiny_values: Callable) -> Path:
    """The file that a workflow makes, run small from the command line."""
    folder = results / name
    if not folder.exists():
        options = [
            word for (key, field), value in tiny_values(name).items() for word in ("--set", f"{key}.{field}={value}")
        ]
        places = ["--models", str(tiny_models), "--input", str(example_inputs), "--output", str(folder)]
        assert cli.main(["run", str(FOLDER / "api" / f"{name}.json"), *places, *options, "--quiet"]) == 0
    (file,) = (path for path in folder.rglob("*") if path.is_file())
    return file


def heard(file: Path) -> np.ndarray:
    """The sound of a file at 48 kHz, mixed to one side: [samples]."""
    mono = av.AudioResampler(format="fltp", layout="mono", rate=48000)
    with av.open(str(file)) as container:
        parts = [out for part in (*container.decode(audio=0), None) for out in mono.resample(part)]
    return np.concatenate([part.to_ndarray()[0] for part in parts])


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the first half second, without the first AAC frame."""
    return float(np.corrcoef(a[1024:24000], b[1024:24000])[0, 1])


def test_workflow_makes_a_finished_file(name: str, finished: Path):
    width, height, frames = CLIPS[name]
    with av.open(str(finished)) as container:
        (audio,) = container.streams.audio
        assert (audio.rate, audio.channels) == (48000, 1 if name == "audio_to_video" else 2)
        if name == "text_to_audio":
            assert (finished.suffix, audio.codec_context.name, len(container.streams.video)) == (".flac", "flac", 0)
        else:
            (video,) = container.streams.video
            assert (finished.suffix, video.codec_context.name, audio.codec_context.name) == (".mp4", "h264", "aac")
            assert (video.width, video.height, video.average_rate) == (width, height, 24)
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert len(pictures) == frames
            assert np.std(pictures[-1]) > 1
    samples = heard(finished)
    if name == "text_to_audio":
        assert len(samples) == 480 * (4 * round(25 * frames / 24) - 3)
    else:
        assert abs(len(samples) - frames / 24 * 48000) <= 1024, "one AAC frame holds 1024 samples"
    assert samples.std() > 1e-3


@pytest.mark.parametrize("name", ["audio_to_video"], indirect=True)
def test_a_sound_that_is_kept_is_delivered(finished: Path, example_inputs: Path):
    assert likeness(heard(finished), heard(example_inputs / "example.wav")) > 0.99


@pytest.mark.parametrize("name", ["text_to_video"], indirect=True)
def test_made_sound_is_unlike_the_example(finished: Path, example_inputs: Path):
    assert abs(likeness(heard(finished), heard(example_inputs / "example.wav"))) < 0.5


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
def test_raw_sound_has_four_mel_frames_a_latent_less_three(label, rate, hop, tiny_models: Path, tmp_path: Path):
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
    host = StandaloneHost([tiny_models], tmp_path, tmp_path, progress="quiet")
    with use_host(host):
        execute(validate(prompt, nodes), nodes, host)
    for key, (frames, fps) in clips.items():
        latents = round(25 * frames / fps)
        kept = Keep.kept.pop(key)
        assert kept.audio["sample_rate"] == rate
        assert kept.audio["waveform"].shape == (1, 2, hop * (4 * latents - 3))
        assert kept.images.shape == (frames, 64, 64, 3)


@pytest.mark.parametrize("document", ["README.md", "workflows/README.md"])
def test_the_commands_of_the_documents_name_what_the_workflow_has(document):
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("    ltx2 run ")]
    assert commands
    for command in commands:
        prompt = json.loads((ROOT / command[2]).read_text(encoding="utf-8"))
        settings = [value for option, value in itertools.pairwise(command) if option == "--set"]
        assert settings
        assert apply_settings(prompt, OURS | CORE_NODES, settings) != prompt
