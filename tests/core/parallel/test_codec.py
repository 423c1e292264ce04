"""What jobs are made of, on its way to other processes: everything arrives as it was, and nothing else is built."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.audio import KeepAudio, ReferenceAudio, RetakeAudio, Sound
from ltx2_engine.ltx2_core.conditioning.extension import ExtendAudio, ExtendVideo
from ltx2_engine.ltx2_core.conditioning.image import ImageCondition
from ltx2_engine.ltx2_core.conditioning.keyframe import GeneratedKeyframes, KeyframeCondition
from ltx2_engine.ltx2_core.conditioning.kinds import CONDITIONS
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.conditioning.masks import InpaintVideo, KeepVideo, RetakeVideo
from ltx2_engine.ltx2_core.conditioning.reference import ReferenceVideo
from ltx2_engine.ltx2_core.conditioning.weighted import AttentionStrength
from ltx2_engine.ltx2_core.fleet.codec import CodecError, from_json, to_json
from ltx2_engine.ltx2_core.fleet.requests import REQUESTS, pack, unpack
from ltx2_engine.ltx2_core.host import PreviewSpec
from ltx2_engine.ltx2_core.job import SampleJob
from ltx2_engine.ltx2_core.model_spec import LoraSpec, ModelSpec
from ltx2_engine.ltx2_core.parallel.messages import decode, encode
from ltx2_engine.ltx2_core.sampling.choice import SAMPLER_NAMES, SamplerChoice
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.text.context import Context

FRAMES = torch.rand(9, 8, 8, 3)
SOUND = Sound(torch.rand(1, 2, 800), 16000)
CONDITION_OF = {
    "image": ImageCondition(FRAMES[0], 0.5, crf=3, latent_index=-1),
    "keyframe": KeyframeCondition(FRAMES, 4, strength=1),
    "generated keyframes": GeneratedKeyframes((2, 5), torch.rand(1, 16, 2, 2, 2).bfloat16()),
    "reference video": ReferenceVideo(FRAMES, downscale=2),
    "attention strength": AttentionStrength(KeyframeCondition(FRAMES, 0), 0.3, FRAMES[..., 0]),
    "extend video": ExtendVideo(FRAMES, "backward", 0.9),
    "extend audio": ExtendAudio(SOUND, 17),
    "retake video": RetakeVideo(FRAMES, 0.1, 0.2),
    "retake audio": RetakeAudio(SOUND, 0.1, 0.2, pad=True),
    "inpaint video": InpaintVideo(FRAMES, FRAMES[..., 0]),
    "keep video": KeepVideo(FRAMES),
    "keep audio": KeepAudio(SOUND, start=0.25),
    "reference audio": ReferenceAudio(SOUND),
}
CLIP = ClipShape(17, 64, 96, 24.0)
SPEC = ModelSpec(
    Path("/models/a.safetensors"),
    Path("/models/gemma"),
    "float32",
    "cpu",
    (("/models/a.safetensors", 7, 1 << 62),),
    loras=(LoraSpec(Path("/models/b.safetensors"), 0.5, ("/models/b.safetensors", 3, 4)),),
    ranks=2,
)


def job(*conditions, **fields):
    latent = AVLatent(CLIP, latents=AV(audio=torch.rand(1, 2, 18, 16)), conditions=conditions)
    guidance = StreamGuidance(cfg=3.0, stg=1.0, stg_blocks=(1, 2), rescale=0.7)
    context = Context(AV(torch.rand(1, 4, 8), torch.rand(1, 4, 6).bfloat16()))
    given = {"negative": None, "sampler": SamplerChoice("euler"), "seed": 2**64 - 1, **fields}
    return SampleJob(latent, context, guidance=AV(guidance, StreamGuidance()), sigmas=(1.0, 0.5, 0.0), **given)


def there_and_back(value, kind):
    tensors = []
    return from_json(json.loads(json.dumps(to_json(value, tensors))), [tensor.clone() for tensor in tensors], kind)


def same(a, b):
    """Whether two values are equal down to types and bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return type(a) is type(b) and a == b


def test_there_is_an_example_of_every_condition():
    assert CONDITION_OF.keys() == CONDITIONS.keys()


@pytest.mark.parametrize("name", CONDITION_OF)
def test_jobs_with_every_condition_arrive_as_they_were(name):
    given = job(CONDITION_OF[name])
    assert same(there_and_back(given, SampleJob), given)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_samplers_arrive_as_they_were(name):
    given = job(*CONDITION_OF.values(), sampler=SamplerChoice(name, gamma=1), negative=job().positive)
    assert same(there_and_back(given, SampleJob), given)


def test_other_values_arrive_as_they_were():
    preview = PreviewSpec(((0.1, 0.2, 0.3), (0, 1, 2)), (0.0, 0.1, 0.2))
    for given, kind in ((SPEC, ModelSpec), (preview, PreviewSpec | None), (None, PreviewSpec | None), ("x", str)):
        assert same(there_and_back(given, kind), given)


@pytest.mark.parametrize("value", [object(), [1], {"a": 1}, b"x", 1j, torch.zeros(2, dtype=torch.complex64)])
def test_other_things_do_not_travel(value):
    with pytest.raises(CodecError, match="not go to workers"):
        to_json(value, [])


def changed(**fields):
    return {**to_json(CLIP, []), **fields}


WRONG = {
    "an unknown class": ({"is": "Popen", "args": "x"}, ClipShape, "'Popen' is nothing that crosses"),
    "no class": ({"frames": 1}, ClipShape, "'None' is nothing"),
    "another class": (
        to_json(SamplerChoice("euler"), []),
        ClipShape,
        "the value is a SamplerChoice; it must be ClipShape",
    ),
    "a field too many": (changed(extra=1), ClipShape, r"unknown \['extra'\], missing \[\]"),
    "a field too few": ({"is": "ClipShape", "frames": 9}, ClipShape, r"missing \['fps', 'height', 'width'\]"),
    "a text for a number": (changed(frames="9"), ClipShape, "frames of a ClipShape is a str; it must be int"),
    "a truth for a number": (changed(frames=True), ClipShape, "frames of a ClipShape is a bool"),
    "what the class refuses": (changed(frames=10), ClipShape, "10 frames do not fit the model"),
    "a tensor that is not there": (
        {"is": "tensor", "number": 1, "dtype": "F32", "shape": [2]},
        torch.Tensor,
        "one of 1",
    ),
    "a tensor by a negative number": (
        {"is": "tensor", "number": -1, "dtype": "F32", "shape": [2]},
        torch.Tensor,
        "of 1",
    ),
    "a tensor of another shape": (
        {"is": "tensor", "number": 0, "dtype": "F32", "shape": [3]},
        torch.Tensor,
        "announced",
    ),
    "a tensor of another dtype": (
        {"is": "tensor", "number": 0, "dtype": "F16", "shape": [2]},
        torch.Tensor,
        "announced",
    ),
    "a path that is none": ({"is": "path", "path": 3}, Path, "a path is one text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_anything_else_is_refused(name):
    value, kind, says = WRONG[name]
    with pytest.raises(ValueError, match=says):
        from_json(value, [torch.zeros(2)], kind)


def test_what_lies_too_deep_is_refused():
    value = []
    for _ in range(30):
        value = [value]
    with pytest.raises(CodecError, match="20 deep"):
        from_json(value, [], tuple)


def test_a_condition_must_be_one():
    tensors = []
    body = to_json(job(CONDITION_OF["keep video"]), tensors)
    body["latent"]["conditions"] = [to_json(CLIP, tensors)]
    with pytest.raises(CodecError, match="conditions of a AVLatent"):
        from_json(body, tensors, SampleJob)


# jobs as messages ------------------------------------------------------------------------------------------------------


def test_small_jobs_are_messages_and_large_ones_share_memory(monkeypatch):
    given = job(CONDITION_OF["image"])
    arguments = {"job": given, "preview": None}
    small = pack("sample", SPEC, arguments, {})
    assert small.segment is None
    prefix, tensors = encode(small)
    assert same(unpack(decode(prefix[20:], tensors, None)).arguments["job"], given)
    monkeypatch.setattr("ltx2_engine.ltx2_core.fleet.requests._MOST_IN_A_MESSAGE", 0)
    large = pack("sample", SPEC, arguments, {"frames": (torch.float32, (2, 3))})
    with large.segment:
        assert not large.tensors
        request = unpack(large)
        assert same(request.arguments["job"], given)
        assert same(request.spec, SPEC)
        assert request.out["frames"].shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "shell"}, "there is no job 'shell'; there are start"),
        ({"body": {}}, "encode needs a spec and the arguments prompt"),
        ({"body": {"spec": to_json(SPEC, []), "arguments": {"prompt": 3}}}, "the value is a int; it must be str"),
        ({"body": {"spec": None, "arguments": {"prompt": "x"}}}, "must be ModelSpec"),
        ({"tensors": {"x": torch.zeros(1)}}, "tensors of a job are numbered"),
    ],
)
def test_jobs_that_are_none_are_refused(change, says):
    with pytest.raises(CodecError, match=says):
        unpack(dataclasses.replace(pack("encode", SPEC, {"prompt": "x"}, {}), **change))
    assert set(REQUESTS) >= {"encode"}
