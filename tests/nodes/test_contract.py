"""What every node declares: complete, consistent with its method, quick, torch-free, and kept from release to release.

After adding an input or widening a range, write the snapshot anew:
``LTX2_WRITE_SNAPSHOT=1 pytest tests/nodes/test_contract.py``.
"""

import ast
import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ltx2_engine.ltx2_core import presets
from ltx2_engine.ltx2_core.host import use_host
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, links, load

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = ROOT / "tests" / "data" / "node_inputs.json"

WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool, "COMBO": str}
NATIVE = {"IMAGE", "AUDIO", "VIDEO", "MASK", "LATENT", "CONDITIONING"}
LINKS = NATIVE | {value for name, value in vars(links).items() if name.isupper()}
FILE_LISTS = {
    ("LTX2LoadModel", "checkpoint"),
    ("LTX2LoadModel", "text_encoder"),
    ("LTX2LoadModel", "device"),
    ("LTX2LoadLora", "lora"),
    ("LTX2UpscaleLatent", "upsampler"),
}
# methods that hand all inputs on by keyword: to this function, whose signature is theirs
HANDED_ON = {("LTX2LoadModel", "execute"): load._spec, ("LTX2LoadModel", "IS_CHANGED"): load._spec}


def parameters_of(name: str, method: str) -> dict[str, inspect.Parameter]:
    function = HANDED_ON.get((name, method)) or getattr(NODE_CLASS_MAPPINGS[name], method)
    return dict(inspect.signature(function).parameters)


def declared() -> dict:
    """Every node's ``INPUT_TYPES`` where no model file exists."""
    with use_host(StandaloneHost(progress="quiet")):
        return {name: node.INPUT_TYPES() for name, node in NODE_CLASS_MAPPINGS.items()}


INPUTS = {
    (node, name): (section, field)
    for node, sections in declared().items()
    for section in ("required", "optional")
    for name, field in sections.get(section, {}).items()
}


def is_sentence(text: str) -> bool:
    # a sentence may start with the name of an option, which is lower case
    return len(text) > 3 and text.endswith(".") and text == text.strip() and "  " not in text


# nodes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_node_says_what_it_is(name):
    node = NODE_CLASS_MAPPINGS[name]
    assert node.__name__ == name
    assert name.startswith("LTX2")
    assert NODE_DISPLAY_NAME_MAPPINGS[name].startswith("LTX-2 ")
    assert node.CATEGORY.startswith("LTX-2 Engine/")
    assert is_sentence(node.DESCRIPTION)
    assert node.__doc__
    assert is_sentence(node.__doc__.strip())
    assert all(isinstance(word, str) and word for word in getattr(node, "SEARCH_ALIASES", []))
    assert not [key for key, value in vars(node).items() if isinstance(value, (list, dict)) and key != "SEARCH_ALIASES"]


def test_display_names_are_complete_and_distinct():
    assert list(NODE_DISPLAY_NAME_MAPPINGS) == list(NODE_CLASS_MAPPINGS)
    assert len(set(NODE_DISPLAY_NAME_MAPPINGS.values())) == len(NODE_CLASS_MAPPINGS)


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_outputs_have_types_names_and_tooltips(name):
    node = NODE_CLASS_MAPPINGS[name]
    assert isinstance(node.RETURN_TYPES, tuple)
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS) > 0
    assert set(node.RETURN_TYPES) <= {*LINKS, *WIDGETS}
    assert len(set(node.RETURN_NAMES)) == len(node.RETURN_NAMES)
    assert all(is_sentence(tooltip) for tooltip in node.OUTPUT_TOOLTIPS)


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_method_returns_as_many_values_as_declared(name):
    node = NODE_CLASS_MAPPINGS[name]
    module = ast.parse(Path(inspect.getfile(node)).read_text(encoding="utf-8"))
    (body,) = (n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name)
    (method,) = (n for n in body.body if isinstance(n, ast.FunctionDef) and n.name == node.FUNCTION)
    returned = [result_of(n.value) for n in ast.walk(method) if isinstance(n, ast.Return)]
    assert returned
    assert all(isinstance(value, ast.Tuple) and len(value.elts) == len(node.RETURN_TYPES) for value in returned)


def result_of(returned: ast.expr) -> ast.expr:
    """The values of the outputs, also where something is shown beside them."""
    if not isinstance(returned, ast.Dict):
        return returned
    parts = {key.value: value for key, value in zip(returned.keys, returned.values, strict=True)}
    assert set(parts) == {"ui", "result"}
    return parts["result"]


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_method_takes_exactly_the_declared_inputs(name):
    node = NODE_CLASS_MAPPINGS[name]
    method = inspect.getattr_static(node, node.FUNCTION)
    assert node.FUNCTION == "execute"
    assert isinstance(method, (classmethod, staticmethod)), "a node keeps no state"
    own = {input: field for (owner, input), field in INPUTS.items() if owner == name}
    parameters = parameters_of(name, node.FUNCTION)
    rest = [p for p in parameters if parameters[p].kind is inspect.Parameter.VAR_KEYWORD]
    for collected in rest:  # takes the required ones that it does not name
        del parameters[collected]
    assert set(parameters) <= set(own)
    unnamed = set(own) - set(parameters)
    assert not unnamed or rest
    assert all(own[input][0] == "required" for input in unnamed)
    for input, parameter in parameters.items():
        section, (type, options) = own[input]
        if section == "required":
            assert parameter.default is inspect.Parameter.empty, f"{input}: required, so it has no default in Python"
        elif type in WIDGETS:
            assert parameter.default == options["default"], input
        else:
            assert parameter.default is None, input


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_checks_name_declared_inputs_only(name):
    node = NODE_CLASS_MAPPINGS[name]
    own = {input for owner, input in INPUTS if owner == name}
    for check in ("VALIDATE_INPUTS", "IS_CHANGED"):
        if hasattr(node, check):
            assert set(parameters_of(name, check)) <= own, check


# inputs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("node", "name"), INPUTS, ids=".".join)
def test_input_has_type_tooltip_and_a_default_in_range(node, name):
    _, (type, options) = INPUTS[node, name]
    assert is_sentence(options["tooltip"])
    if type in LINKS:
        assert "default" not in options
        return
    assert type in WIDGETS
    if type == "COMBO":
        assert all(isinstance(option, str) for option in options["options"])
        assert len(set(options["options"])) == len(options["options"])
        if not options["options"]:
            assert (node, name) in FILE_LISTS, "only a list of files may be empty"
            return
        assert options["default"] in options["options"]
    default = options["default"]
    assert isinstance(default, WIDGETS[type])
    if type in ("INT", "FLOAT"):
        assert options["min"] <= default <= options["max"]
        assert options["step"] > 0
    json.dumps(options)


def test_input_types_are_pure():
    before = declared()
    kept = copy.deepcopy(before)
    for sections in before.values():
        for fields in sections.values():
            for _, options in fields.values():
                options["tooltip"] = "changed"
                options.get("options", []).append("changed")
    assert declared() == kept


def test_input_types_are_quick_and_need_no_torch():
    script = """
import json, sys, time, types
package = types.ModuleType("ltx2_engine")
package.__path__ = [sys.argv[1]]
sys.modules["ltx2_engine"] = package
from ltx2_engine.nodes import NODE_CLASS_MAPPINGS
def ask():
    start = time.perf_counter()
    for node in NODE_CLASS_MAPPINGS.values():
        node.INPUT_TYPES()
    return time.perf_counter() - start
print(json.dumps({"seconds": min(ask() for _ in range(5)), "torch": "torch" in sys.modules}))
"""
    command = [sys.executable, "-I", "-S", "-c", script, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["torch"]
    assert found["seconds"] < 0.02, "for all nodes together"


def test_offered_names_are_those_that_are_implemented():
    from ltx2_engine.ltx2_core.evaluate import EVALUATIONS
    from ltx2_engine.ltx2_core.model_spec import DTYPES
    from ltx2_engine.ltx2_core.parallel.helix_topology import Attention, Decoder
    from ltx2_engine.ltx2_core.parallel.helix_traffic import choose, kind_of
    from ltx2_engine.ltx2_core.sampling.choice import FOLLOW_NOISE_SEED, NOISE_KINDS, SamplerChoice
    from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance
    from ltx2_engine.ltx2_core.sampling.noise import NOISE_LAYOUTS
    from ltx2_engine.ltx2_core.sampling.samplers import SAMPLERS
    from ltx2_engine.ltx2_core.sampling.sigmas import schedule

    offered = {key: field[1]["options"] for key, (_, field) in INPUTS.items() if field[0] == "COMBO"}
    assert offered["LTX2SelectSampler", "sampler"] == list(SAMPLERS) == list(presets.SAMPLERS)
    assert offered["LTX2Sigmas", "schedule"] == list(presets.SCHEDULES)
    for name in presets.SCHEDULES:
        assert schedule(name, 4)[-1] == 0.0
    assert offered["LTX2Guider", "preset"] == list(presets.GUIDANCE_PRESETS)
    strengths = {f"{stream}_{name}" for stream in ("video", "audio") for name in ("cfg", "stg", "modality", "rescale")}
    assert {name.partition("_")[2] for name in strengths} <= set(StreamGuidance.__dataclass_fields__)
    for values in presets.GUIDANCE_PRESETS.values():
        assert set(values) == strengths | {"stg_blocks", "evaluation"}
        assert set(values) <= {name for owner, name in INPUTS if owner == "LTX2Guider"}
    assert set(presets.SAMPLER_PRESETS) == set(presets.SAMPLERS)
    for name, values in presets.SAMPLER_PRESETS.items():
        assert set(values) <= {name for owner, name in INPUTS if owner == "LTX2SelectSampler"}
        own = SamplerChoice(name)
        follows = own.sde_seed == FOLLOW_NOISE_SEED
        assert (own.eta, own.noise_kind, follows) == (values["eta"], values["noise_kind"], values["follow_seed"])
    assert offered["LTX2SelectSampler", "noise_kind"] == list(presets.NOISE_KINDS) == list(NOISE_KINDS)
    assert offered["LTX2Sampler", "noise_layout"] == list(presets.NOISE_LAYOUTS) == list(NOISE_LAYOUTS)
    assert set(presets.EVALUATIONS) == {"auto", *EVALUATIONS}
    assert offered["LTX2Decode", "tiling"] == list(presets.TILINGS)
    assert offered["LTX2LoadModel", "dtype"] == list(DTYPES)
    topologies = offered["LTX2EnhancePrompt", "topology"]
    assert topologies == list(presets.ENHANCE_TOPOLOGIES)
    decoder = Decoder(64, 64, 64, (Attention(1, 8, 8, 8),))
    assert [kind_of(choose(decoder, 4, 64, choice=one)) for one in topologies] == ["tensor", *topologies[1:]]


# from release to release ---------------------------------------------------------------------------------------------


def snapshot() -> dict:
    """What workflows rely on: each input's section, type, range and choices; each output's type."""
    kept = ("min", "max", "options")
    nodes = {name: {"inputs": {}, "outputs": list(node.RETURN_TYPES)} for name, node in NODE_CLASS_MAPPINGS.items()}
    for (node, name), (section, (type, options)) in INPUTS.items():
        entry = {"section": section, "type": type}
        if (node, name) not in FILE_LISTS:
            entry |= {key: options[key] for key in kept if key in options}
        nodes[node]["inputs"][name] = entry
    return nodes


def breaks(old: dict, new: dict) -> list[str]:
    """Changes from ``old`` to ``new`` that would break a saved workflow."""
    found = []
    for node, before in old.items():
        if node not in new:
            found.append(f"{node} was removed")
            continue
        now = new[node]
        if now["outputs"][: len(before["outputs"])] != before["outputs"]:
            found.append(f"{node}: outputs were {before['outputs']}, are {now['outputs']}")
        for name, was in before["inputs"].items():
            found += [f"{node}.{name} {change}" for change in _input_breaks(was, now["inputs"].get(name))]
        added = set(now["inputs"]) - set(before["inputs"])
        found += [f"{node}.{name} is new and required" for name in sorted(added) if _required(now, name)]
    return found


def _required(node: dict, name: str) -> bool:
    return node["inputs"][name]["section"] == "required"


def _input_breaks(was: dict, now: dict | None) -> list[str]:
    if now is None:
        return ["was removed or renamed"]
    found = []
    if was["section"] == "optional" and now["section"] == "required":
        found.append("became required")
    if was["type"] != now["type"]:
        found.append(f"was {was['type']}, is {now['type']}")
    if "min" in was and (now.get("min", was["min"]) > was["min"] or now.get("max", was["max"]) < was["max"]):
        found.append("has a narrower range")
    lost = set(was.get("options", [])) - set(now.get("options", was.get("options", [])))
    return found + [f"lost the choice {choice}" for choice in sorted(lost)]


def test_saved_workflows_keep_working():
    assert breaks(json.loads(SNAPSHOT.read_text(encoding="utf-8")), snapshot()) == []


def test_snapshot_holds_every_input():
    if os.environ.get("LTX2_WRITE_SNAPSHOT"):
        SNAPSHOT.write_text(json.dumps(snapshot(), indent=1) + "\n", encoding="utf-8")
    assert json.loads(SNAPSHOT.read_text(encoding="utf-8")) == snapshot(), "write it anew: see the top of this file"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda new: new.pop("LTX2Sampler"), "LTX2Sampler was removed"),
        (lambda new: new["LTX2Sampler"]["inputs"].pop("seed"), "LTX2Sampler.seed was removed or renamed"),
        (lambda new: new["LTX2Sampler"]["inputs"]["seed"].update(max=9), "LTX2Sampler.seed has a narrower range"),
        (lambda new: new["LTX2Sampler"]["inputs"]["seed"].update(type="FLOAT"), "LTX2Sampler.seed was INT, is FLOAT"),
        (lambda new: new["LTX2Decode"]["inputs"]["tiling"].update(options=["auto"]), "lost the choice none"),
        (lambda new: new["LTX2Decode"]["inputs"]["tiling"].update(section="required"), "tiling became required"),
        (lambda new: new["LTX2Decode"].update(outputs=["IMAGE"]), "LTX2Decode: outputs were"),
        (
            lambda new: new["LTX2Decode"]["inputs"].update(x={"section": "required", "type": "INT"}),
            "LTX2Decode.x is new and required",
        ),
    ],
)
def test_broken_workflows_are_noticed(change, message):
    new = snapshot()
    change(new)
    assert any(message in found for found in breaks(snapshot(), new))
