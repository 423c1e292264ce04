"""A corpus of broken prompts against the error types that ComfyUI 0.33 gives for them."""

import asyncio
import copy
import json

import pytest
from ltx2_engine.nodes.runner.validate import validate
from ltx2_engine.nodes.runner.workflow import WorkflowError, parse_workflow


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def shown(class_type, **inputs):
    return {"1": node(class_type, **inputs), "2": node("Show", value=["1", 0])}


TYPED = {"text": "t", "flag": True, "choice": "a", "old": "x", "real": 0.5}

# prompt, {node: error types} (ComfyUI's, in declared order)
BROKEN = {
    "required_missing": (shown("Number"), {"1": ["required_input_missing"]}),
    "two_problems_of_one_node": (
        shown("Typed", text="t", flag=True, choice="z", old="z"),
        {"1": ["value_not_in_list", "value_not_in_list", "required_input_missing"]},
    ),
    "short_link": (shown("Number", value=["3"]), {"1": ["bad_linked_input"]}),
    "long_link": (shown("Number", value=[1, 2, 3]), {"1": ["bad_linked_input"]}),
    "wrong_type": (
        {"0": node("Thing"), **shown("Number", value=["0", 0])},
        {"1": ["return_type_mismatch"]},
    ),
    "not_a_number": (shown("Number", value="seven"), {"1": ["invalid_input_type"]}),
    "null": (shown("Number", value=None), {"1": ["invalid_input_type"]}),
    "infinite_integer": (shown("Number", value=float("inf")), {"1": ["invalid_input_type"]}),
    "below": (shown("Number", value=-1), {"1": ["value_smaller_than_min"]}),
    "above": (shown("Number", value=11), {"1": ["value_bigger_than_max"]}),
    "real_below": (shown("Number", value=1, scale=-2.1), {"1": ["value_smaller_than_min"]}),
    "choice": (shown("Typed", **TYPED | {"choice": "b"}), {"1": ["value_not_in_list"]}),
    "old_choice": (shown("Typed", **TYPED | {"old": "z"}), {"1": ["value_not_in_list"]}),
    "choice_by_number": (shown("Typed", **TYPED | {"choice": 2.3}), {"1": ["value_not_in_list"]}),
    "multiselect": (shown("Typed", **TYPED, many={"__value__": ["a", "q"]}), {"1": ["value_not_in_list"]}),
    "custom": (shown("Checked", value=4, other=1), {"1": ["custom_validation_failed"]}),
    "custom_and_range": (
        shown("Checked", value=4, other=11),
        {"1": ["value_bigger_than_max", "custom_validation_failed"]},
    ),
    "custom_raises": (shown("Checked", value=13, other=1), {"1": ["exception_during_inner_validation"]}),
    "custom_types": (
        {"0": node("Thing"), **shown("AnyType", a=["0", 0], b=["0", 1])},
        {"1": ["custom_validation_failed"]},
    ),
    "self_loop": (shown("Number", value=["1", 0]), {"1": ["dependency_cycle"]}),
    "cycle": (
        {"0": node("Number", value=["1", 0]), **shown("Number", value=["0", 0])},
        {"0": ["dependency_cycle"], "1": ["dependency_cycle"]},
    ),
    "link_to_nowhere": ({"2": node("Show", value=["9", 0])}, {"2": ["exception_during_validation"]}),
    "inner_link_to_nowhere": (shown("Number", value=["9", 0]), {"1": ["exception_during_inner_validation"]}),
    "slot_too_high": (
        {"0": node("Thing"), "2": node("Show", value=["0", 2])},
        {"2": ["exception_during_validation"]},
    ),
    "slot_is_a_text": (
        {"0": node("Thing"), "2": node("Show", value=["0", "1"])},
        {"2": ["exception_during_validation"]},
    ),
}

# ComfyUI accepts these
STRICTER = {
    "nan": (shown("Number", value=1, scale=float("nan")), {"1": ["invalid_input_type"]}),
    "infinite": (shown("Typed", **TYPED | {"real": float("inf")}), {"1": ["invalid_input_type"]}),
    "nan_text": (shown("Typed", **TYPED | {"real": "nan"}), {"1": ["invalid_input_type"]}),
    "constant_on_a_socket": (
        {"1": node("Join", a=1, b=2, thing="hello"), "2": node("Show", value=["1", 0])},
        {"1": ["invalid_input_type"]},
    ),
    "negative_slot": (
        {"0": node("Thing"), "2": node("Show", value=["0", -1])},
        {"2": ["exception_during_validation"]},
    ),
}


@pytest.mark.parametrize("name", [*BROKEN, *STRICTER])
def test_broken_prompts_have_comfyui_error_types(name, toys):
    prompt, want = {**BROKEN, **STRICTER}[name]
    before = copy.deepcopy(prompt)
    with pytest.raises(WorkflowError) as raised:
        validate(prompt, toys)
    body = raised.value.body
    assert {key: [e["type"] for e in report["errors"]] for key, report in body["node_errors"].items()} == want
    assert body["error"]["type"] == "prompt_outputs_failed_validation"
    assert set(body["error"]) == {"type", "message", "details", "extra_info"}
    for key, report in body["node_errors"].items():
        assert report["class_type"] == prompt[key]["class_type"]
        assert report["dependent_outputs"] == ["2"]
        assert all(set(e) == {"type", "message", "details", "extra_info"} for e in report["errors"])
    assert repr(prompt) == repr(before)
    json.dumps(body)


@pytest.mark.parametrize(
    ("prompt", "type"),
    [
        ({"1": {"inputs": {}}}, "missing_node_type"),
        ({"1": {"class_type": None, "inputs": {}}}, "missing_node_type"),
        ({"1": node("Gone"), "2": node("Show", value=1)}, "missing_node_type"),
        ({"1": node("Number", value=1)}, "prompt_no_outputs"),
    ],
)
def test_broken_wholes(prompt, type, toys):
    with pytest.raises(WorkflowError) as raised:
        validate(prompt, toys)
    assert raised.value.type == type
    assert raised.value.body["node_errors"] == {}


def test_missing_node_names_the_title_and_the_class(toys):
    prompt = {"7": {"class_type": "Gone", "inputs": {}, "_meta": {"title": "My node"}}}
    with pytest.raises(WorkflowError, match="Node 'My node' not found") as raised:
        validate(prompt, toys)
    assert raised.value.body["error"]["extra_info"] == {
        "node_id": "7",
        "class_type": "Gone",
        "node_title": "My node",
    }


def test_error_carries_input_value_and_config(toys):
    with pytest.raises(WorkflowError) as raised:
        validate(shown("Number", value=11), toys)
    (problem,) = raised.value.body["node_errors"]["1"]["errors"]
    assert problem["message"] == "Value 11 bigger than max of 10"
    assert problem["details"] == "value"
    assert problem["extra_info"] == {
        "input_name": "value",
        "input_config": ("INT", {"default": 1, "min": 0, "max": 10}),
        "received_value": 11,
    }


def test_a_long_list_of_choices_is_not_sent_back(toys):
    class Long(toys["Number"]):
        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"value": ("COMBO", {"options": [f"secret{i}" for i in range(21)]})}}

    with pytest.raises(WorkflowError) as raised:
        validate(shown("Long", value="x"), toys | {"Long": Long})
    assert "secret" not in json.dumps(raised.value.body)
    assert "list of length 21" in str(raised.value.body)


def test_one_invalid_output_fails_the_run_and_names_its_dependents(toys):
    prompt = {
        **shown("Number", value=11),
        "3": node("Show", value=["1", 0]),
        "4": node("Show", value=5),
    }
    with pytest.raises(WorkflowError) as raised:
        validate(prompt, toys)
    assert sorted(raised.value.body["node_errors"]["1"]["dependent_outputs"]) == ["2", "3"]
    assert "4" not in raised.value.body["node_errors"]


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"text": 5}, {"text": "5"}),
        ({"flag": 0}, {"flag": False}),
        ({"flag": "false"}, {"flag": True}),
        ({"real": "0.25"}, {"real": 0.25}),
        ({"real": True}, {"real": 1.0}),
        ({"many": {"__value__": ["a", "b"]}}, {"many": ["a", "b"]}),
        ({"text": {"__value__": [1]}}, {"text": "[1]"}),
    ],
)
def test_constants_are_converted_as_in_comfyui(given, want, toys):
    inputs = validate(shown("Typed", **TYPED | given), toys)["1"]["inputs"]
    assert inputs == TYPED | want
    assert all(type(inputs[key]) is type(value) for key, value in want.items())


def test_a_fraction_for_an_integer_is_cut(toys):
    assert validate(shown("Number", value=3.9), toys)["1"]["inputs"]["value"] == 3


def test_unions_any_type_and_absent_optional_sockets_pass(toys):
    prompt = {
        "0": node("Thing"),
        "1": node("Join", a=["0", 1], b=["0", 1], thing=["0", 0]),
        "2": node("Show", value=["1", 0]),
        "3": node("Join", a=["0", 1], b=["0", 1], thing=None),
        "4": node("Show", value=["3", 0]),
    }
    assert validate(prompt, toys) == prompt


def test_unneeded_nodes_are_not_validated(toys):
    assert validate({"1": node("Number", value=99), "2": node("Show", value=1)}, toys)


def test_unknown_inputs_are_ignored_aloud(toys, caplog):
    validate(shown("Number", value=1, valeu=3), toys)
    assert "node 1 (Number) has no input 'valeu'" in caplog.text


def test_every_branch_of_a_shared_node_is_checked_once(toys):
    calls = []

    class Slow(toys["Checked"]):
        @classmethod
        def VALIDATE_INPUTS(cls, value):
            calls.append(value)
            return True

    prompt = {"0": node("Slow", value=1, other=1)}
    for step in range(1, 40):
        prompt[str(step)] = node("Join", a=[str(step - 1), 0], b=[str(step - 1), 0])
    prompt["out"] = node("Show", value=["39", 0])
    validate(prompt, toys | {"Slow": Slow})
    assert calls == [1]


def test_a_chain_deeper_than_the_stack_is_an_error_not_a_crash(toys):
    prompt = {"0": node("Number", value=1)}
    for step in range(1, 3000):
        prompt[str(step)] = node("Number", value=[str(step - 1), 0])
    prompt["out"] = node("Show", value=["2999", 0])
    with pytest.raises(WorkflowError, match="failed validation"):
        validate(prompt, toys)


def test_non_finite_json_constants_reach_the_check(toys):
    text = '{"1": {"class_type": "Number", "inputs": {"value": 1, "scale": NaN}}, ' + (
        '"2": {"class_type": "Show", "inputs": {"value": ["1", 0]}}}'
    )
    with pytest.raises(WorkflowError) as raised:
        validate(parse_workflow(text).prompt, toys)
    (problem,) = raised.value.body["node_errors"]["1"]["errors"]
    assert problem["type"] == "invalid_input_type"
    assert "not a finite number" in problem["details"]


@pytest.mark.comfy
@pytest.mark.parametrize("name", BROKEN)
def test_comfyui_reports_the_same(name, toys, comfy, monkeypatch):
    execution, nodes = comfy
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", toys)
    prompt, want = BROKEN[name]
    with pytest.raises(WorkflowError) as raised:
        validate(prompt, toys)
    ours = raised.value.body["node_errors"]
    accepted, error, _, theirs = asyncio.run(execution.validate_prompt("id", copy.deepcopy(prompt), None))
    assert not accepted
    assert error["type"] == raised.value.type
    assert set(theirs) == set(want)
    for key, report in theirs.items():
        assert ours[key]["dependent_outputs"] == report["dependent_outputs"]
        mine, other = (sorted(r["errors"], key=lambda e: (e["type"], e["details"])) for r in (ours[key], report))
        assert [e["type"] for e in mine] == [e["type"] for e in other]
        for a, b in zip(mine, other, strict=True):
            assert set(a["extra_info"]) == set(b["extra_info"])
            assert a["message"] == b["message"]
            if not a["type"].startswith("exception"):
                assert (a["details"], a["extra_info"]) == (b["details"], b["extra_info"])


@pytest.mark.comfy
@pytest.mark.parametrize("given", [{}, {"text": 5}, {"flag": "false"}, {"real": True}, {"many": {"__value__": ["a"]}}])
def test_comfyui_converts_the_same(given, toys, comfy, monkeypatch):
    execution, nodes = comfy
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", toys)
    theirs = shown("Typed", **copy.deepcopy(TYPED | given))
    assert asyncio.run(execution.validate_prompt("id", theirs, None))[0]
    assert validate(shown("Typed", **TYPED | given), toys) == theirs
