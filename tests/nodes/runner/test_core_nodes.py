"""The shims of ComfyUI's own nodes, run as a user would: from files to files."""

import inspect
from fractions import Fraction

import numpy as np
import pytest
import torch
from ltx2_engine.ltx2_core import media
from ltx2_engine.ltx2_core.host import use_host
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.nodes.runner.core_nodes import CORE_NODES
from ltx2_engine.nodes.runner.execute import execute
from ltx2_engine.nodes.runner.schema import inputs_of
from ltx2_engine.nodes.runner.validate import validate
from ltx2_engine.nodes.runner.workflow import WorkflowError
from PIL import Image


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture
def home(tmp_path):
    (tmp_path / "in").mkdir()
    return StandaloneHost(input_dir=tmp_path / "in", output_dir=tmp_path / "out", progress="quiet")


def run(prompt, home):
    with use_host(home):
        prompt = validate(prompt, CORE_NODES)
    return execute(prompt, CORE_NODES, home)


@pytest.mark.parametrize("name", CORE_NODES)
def test_contract(name):
    cls = CORE_NODES[name]
    assert cls.__name__ == name
    with use_host(StandaloneHost(progress="quiet")):
        inputs = inputs_of(cls)
    parameters = inspect.signature(getattr(cls, cls.FUNCTION)).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for field in inputs.values():
        assert field.options["tooltip"]
        assert takes_any or field.name in parameters
        default = field.options.get("default")
        if field.name in parameters and parameters[field.name].default is not inspect.Parameter.empty:
            assert parameters[field.name].default == default
        if field.choices:
            assert default in field.choices
        if "min" in field.options:
            assert field.options["min"] <= default <= field.options["max"]


def test_pictures_become_a_video_file_with_sound(home, tmp_path):
    sound = {"waveform": torch.sin(torch.arange(24000) / 5)[None, None], "sample_rate": 24000}
    media.write_audio(tmp_path / "in" / "tone.wav", sound)
    prompt = {
        "1": node("EmptyImage", width=64, height=32, batch_size=12, color=0xFF8000),
        "2": node("LoadAudio", audio="tone.wav"),
        "3": node("CreateVideo", images=["1", 0], fps=12, audio=["2", 0]),
        "4": node("SaveVideo", **{"video": ["3", 0], "filename_prefix": "clips/%width%", "format": "auto"}),
        "5": node("GetVideoComponents", video=["4", 0]),
        "6": node("SaveImage", images=["5", 0], filename_prefix="frame"),
        "7": node("SaveAudio", audio=["5", 1], filename_prefix="sound"),
    }
    home.metadata = {"prompt": prompt}
    result = run(prompt, home)
    saved = {"filename": "64_00001_.mp4", "subfolder": "clips", "type": "output"}
    assert result.outputs["4"] == {"images": [saved], "animated": [True]}
    clip = media.read_video(tmp_path / "out" / "clips" / "64_00001_.mp4")
    assert (clip.get_frame_count(), clip.get_dimensions(), clip.frame_rate) == (12, (64, 32), Fraction(12))
    assert torch.allclose(clip.images.mean(dim=(0, 1, 2)), torch.tensor([1, 128 / 255, 0]), atol=0.02)
    assert [path.name for path in result.files if path.suffix == ".png"] == [f"frame_{n:05}_.png" for n in range(1, 13)]
    assert Image.open(tmp_path / "out" / "frame_00001_.png").text["prompt"]
    assert torch.equal(media.read_image(tmp_path / "out" / "frame_00001_.png")[0, 0], torch.tensor([255, 128, 0]) / 255)
    assert media.read_audio(tmp_path / "out" / "sound_00001_.flac")["waveform"].shape == (1, 1, 24000)


def test_the_codec_may_stand_in_either_form(home):
    base = {"1": node("EmptyImage", width=16, height=16, batch_size=1, color=0)}
    base["2"] = node("CreateVideo", images=["1", 0], fps=24)
    for extra in ({"codec": "h264"}, {"format.codec": "auto"}):
        save = node("SaveVideo", video=["2", 0], filename_prefix="v", format="mp4", **extra)
        assert len(run({**base, "3": save}, home).files) == 1
    with pytest.raises(WorkflowError, match="failed validation"):
        run({**base, "3": node("SaveVideo", video=["2", 0], filename_prefix="v", format="webm")}, home)


def test_load_image_gives_picture_and_mask(home, tmp_path):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:4, :, 3] = 0
    Image.fromarray(pixels, "RGBA").save(tmp_path / "in" / "a.png")
    with use_host(home):
        picture, mask = CORE_NODES["LoadImage"].execute("a.png")
    assert picture.shape == (1, 8, 8, 3)
    assert mask.shape == (1, 8, 8)
    assert mask[0, :4].eq(1).all()
    assert mask[0, 4:].eq(0).all()
    Image.fromarray(pixels[..., :3]).save(tmp_path / "in" / "b.png")
    with use_host(home):
        assert CORE_NODES["LoadImage"].execute("b.png")[1].shape == (1, 64, 64)


@pytest.mark.parametrize("class_type", ["LoadImage", "LoadAudio", "LoadVideo"])
@pytest.mark.parametrize("name", ["gone.png", "../secret", "/etc/passwd"])
def test_loaders_check_names_before_the_run(home, class_type, name):
    field = next(iter(CORE_NODES[class_type]().INPUT_TYPES()["required"]))
    with pytest.raises(WorkflowError) as raised:
        run({"1": node(class_type, **{field: name}), "2": node("PreviewAny", source=["1", 0])}, home)
    (problem,) = raised.value.body["node_errors"]["1"]["errors"]
    assert problem["type"] == "custom_validation_failed"
    assert repr(name) in problem["details"]


@pytest.mark.parametrize(
    ("class_type", "value", "text"),
    [
        ("PrimitiveInt", 3.9, "3"),
        ("PrimitiveFloat", "0.5", "0.5"),
        ("PrimitiveString", "a", "a"),
        ("PrimitiveStringMultiline", "a\nb", "a\nb"),
        ("PrimitiveBoolean", 1, "true"),
    ],
)
def test_primitives_hand_on_their_value(home, class_type, value, text):
    result = run({"1": node(class_type, value=value), "2": node("PreviewAny", source=["1", 0])}, home)
    assert result.outputs["2"] == {"text": [text]}


def test_empty_image_bounds_the_product(home):
    with pytest.raises(ValueError, match="4096 pictures of 16384 x 16384"):
        CORE_NODES["EmptyImage"].execute(16384, 16384, 4096)


@pytest.mark.parametrize(
    ("batch_index", "length", "taken"),
    [(0, 3, [0, 1, 2]), (3, 9, [3, 4]), (9, 2, [4]), (-2, 1, [3]), (-9, 2, [0, 1])],
)
def test_pictures_of_a_batch(batch_index, length, taken):
    """As ComfyUI's own node counts: what lies outside the batch is left out, and one picture is always there."""
    batch = torch.arange(5.0).reshape(5, 1, 1, 1)
    (pictures,) = CORE_NODES["ImageFromBatch"].execute(batch, batch_index, length)
    assert pictures.flatten().tolist() == taken
