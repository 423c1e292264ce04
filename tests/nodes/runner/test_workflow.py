import json

import pytest
from ltx2_engine.nodes.runner import workflow
from ltx2_engine.nodes.runner.workflow import WorkflowError, parse_workflow, read_workflow

PROMPT = {"1": {"class_type": "X", "inputs": {}}}
UI = {"nodes": [{"id": 1, "type": "X"}], "links": [], "version": 0.4}


def test_bare_and_wrapped_prompts_are_read(tmp_path):
    extra = {"extra_pnginfo": {"workflow": {}}}
    assert parse_workflow(json.dumps(PROMPT)).prompt == PROMPT
    wrapped = parse_workflow(json.dumps({"prompt": PROMPT, "extra_data": extra}))
    assert (wrapped.prompt, wrapped.extra_data) == (PROMPT, extra)
    (tmp_path / "flow.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(PROMPT).encode())
    assert read_workflow(tmp_path / "flow.json").prompt == PROMPT


def test_a_node_whose_id_is_prompt_is_not_a_wrapper():
    prompt = {"prompt": {"class_type": "X", "inputs": {}}}
    assert parse_workflow(json.dumps(prompt)).prompt == prompt


def test_a_ui_file_is_refused_with_its_api_twin(tmp_path):
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(UI))
    with pytest.raises(WorkflowError, match=r"UI format.*Export \(API\)"):
        read_workflow(path)
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "flow.json").write_text(json.dumps(PROMPT))
    with pytest.raises(WorkflowError, match=r"UI format.*use .*api.flow\.json"):
        read_workflow(path)


@pytest.mark.parametrize(
    ("text", "type", "message"),
    [
        ('{\n "1": {,}\n}', "invalid_prompt", "line 2, column 8"),
        ("", "invalid_prompt", "line 1, column 1"),
        ("[" * 100_000, "invalid_prompt", "nested too deeply"),
        ('{"1": {"class_type": "X"}, "1": {"class_type": "Y"}}', "invalid_prompt", "key '1' stands twice"),
        ('{"1": ' + "9" * 5000 + "}", "invalid_prompt", "digits|expected an object"),
        ("[]", "no_prompt", "one entry a node"),
        ("{}", "no_prompt", "one entry a node"),
        ("3", "no_prompt", "one entry a node"),
        ('{"1": 3}', "invalid_prompt", "node 1: expected an object with class_type and inputs, found int"),
        ('{"1": {"class_type": "X", "inputs": []}}', "invalid_prompt", "inputs must be an object, found list"),
        ('{"1": {"class_type": ["X"]}}', "invalid_prompt", "class_type must be a text, found list"),
        ('{"prompt": {"1": {"class_type": "X"}}, "extra_data": 3}', "invalid_prompt", "extra_data must be an object"),
    ],
)
def test_broken_files_say_where(text, type, message):
    with pytest.raises(WorkflowError, match=message) as raised:
        parse_workflow(text)
    assert raised.value.type == type


def test_size_and_node_count_are_bounded(tmp_path, monkeypatch):
    (tmp_path / "flow.json").write_text(json.dumps(PROMPT))
    monkeypatch.setattr(workflow, "MAX_BYTES", 10)
    with pytest.raises(WorkflowError, match="more than 10 bytes"):
        read_workflow(tmp_path / "flow.json")
    monkeypatch.setattr(workflow, "MAX_NODES", 1)
    with pytest.raises(WorkflowError, match="2, at most 1"):
        parse_workflow(json.dumps({**PROMPT, "2": {}}))


def test_a_missing_or_binary_file_is_a_workflow_error(tmp_path):
    with pytest.raises(WorkflowError, match="cannot be read"):
        read_workflow(tmp_path / "none.json")
    (tmp_path / "bin.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkflowError, match="cannot be read"):
        read_workflow(tmp_path / "bin.json")


def test_a_reason_that_concerns_several_inputs_is_said_once():
    def refused(name, reason):
        return {"type": "custom_validation_failed", "message": "Custom validation failed", "details": name + reason}

    errors = [refused("width", " - too wide"), refused("height", " - too wide"), refused("fps", "")]
    errors.append({"type": "value_not_in_list", "message": "Value not in list", "details": "a - b: 'c' not in []"})
    node_errors = {"3": {"class_type": "Size", "errors": errors}}
    assert WorkflowError("invalid", "No", node_errors=node_errors).lines() == [
        "No",
        "node 3 (Size): Custom validation failed: width, height: too wide",
        "node 3 (Size): Custom validation failed: fps",
        "node 3 (Size): Value not in list: a - b: 'c' not in []",
    ]
