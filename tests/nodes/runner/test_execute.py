"""Execution semantics, on toy nodes."""

import asyncio
import copy
import types

import pytest
import torch
from ltx2_engine.ltx2_core.host import Interrupted, host
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.nodes.runner.execute import NodeFailed, execute
from ltx2_engine.nodes.runner.validate import validate


def node(class_type, title=None, **inputs):
    meta = {"_meta": {"title": title}} if title else {}
    return {"class_type": class_type, "inputs": inputs, **meta}


def run(prompt, toys, standalone=None, **more):
    return execute(validate(prompt, toys), toys, standalone or StandaloneHost(progress="quiet"), **more)


def shown_values(prompt, toys):
    run(prompt, toys)
    return [value for _, value, *_ in toys["Show"].seen]


def test_each_node_runs_once_after_its_sources(toys):
    prompt = {
        "9": node("Show", value=["3", 0]),
        "3": node("Join", a=["1", 0], b=["2", 0]),
        "1": node("Number", value=2),
        "2": node("Number", value=["1", 0]),
        "8": node("Show", value=["1", 0]),
    }
    result = run(prompt, toys)
    assert sorted(result.executed) == ["1", "2", "3", "8", "9"]
    position = {node_id: place for place, node_id in enumerate(result.executed)}
    assert position["1"] < position["2"] < position["3"] < position["9"]
    assert result.outputs == {"9": {"value": [4]}, "8": {"value": [2]}}


def test_a_node_that_no_output_needs_does_not_run(toys):
    result = run({"1": node("Fail", how="raise"), "2": node("Show", value=1)}, toys)
    assert result.executed == ["2"]


def test_hidden_inputs_are_supplied(toys):
    prompt = {"out": node("Show", value=1)}
    run(prompt, toys, extra_data={"extra_pnginfo": {"workflow": {"id": 4}}})
    ((node_id, value, got, extra, dynamic),) = toys["Show"].seen
    assert (node_id, value, got, extra) == ("out", 1, prompt, {"workflow": {"id": 4}})
    assert dynamic.get_original_prompt() == prompt
    assert dynamic.get_node("out") == prompt["out"]
    assert dynamic.has_node("out")
    assert not dynamic.has_node("x")
    assert dynamic.all_node_ids() == {"out"}


def test_absent_optional_and_undeclared_inputs_are_not_passed(toys):
    seen = {}

    class Catch(toys["Number"]):
        def go(self, **values):
            seen.update(values)
            return (1,)

    run({"1": node("Catch", value=3, typo=9), "2": node("Show", value=["1", 0])}, toys | {"Catch": Catch})
    assert seen == {"value": 3}


def test_async_and_class_methods_and_second_slots(toys):
    prompt = {"1": node("Thing"), "2": node("Show", value=["1", 1]), "3": node("Show", value=["1", 0])}
    assert shown_values(prompt, toys) == [5, "thing"]


def test_a_spread_list_runs_downstream_once_an_item(toys):
    prompt = {
        "1": node("Spread", count=3),
        "2": node("Number", value=["1", 0], scale=2.0),
        "3": node("Show", value=["2", 0]),
        "4": node("Show", value=["1", 1]),
    }
    assert shown_values(prompt, toys) == [0, 2, 4, "once"]
    assert run(prompt, toys).outputs["3"] == {"value": [0, 2, 4]}


def test_a_shorter_list_repeats_its_last_item(toys):
    prompt = {
        "1": node("Spread", count=4),
        "2": node("Spread", count=2),
        "3": node("Join", a=["1", 0], b=["2", 0]),
        "4": node("Show", value=["3", 0]),
    }
    assert shown_values(prompt, toys) == [0 + 0, 1 + 1, 2 + 1, 3 + 1]


def test_a_gathering_node_gets_every_input_as_a_list(toys):
    prompt = {
        "1": node("Spread", count=4),
        "2": node("Gather", values=["1", 0], plus=10),
        "3": node("Show", value=["2", 0]),
    }
    assert shown_values(prompt, toys) == [16]


def test_an_empty_list_is_an_error_not_an_index_error(toys):
    prompt = {
        "1": node("Spread", count=0),
        "2": node("Join", a=["1", 0], b=1),
        "3": node("Show", value=["2", 0]),
    }
    with pytest.raises(NodeFailed, match=r"node 2 \(Join\): input 'a' received an empty list"):
        run(prompt, toys)


@pytest.mark.parametrize(("first", "want", "skipped"), [(True, (3, None), "2"), (False, (None, 4), "1")])
def test_only_the_chosen_lazy_branch_runs(toys, first, want, skipped):
    prompt = {
        "1": node("Number", value=3),
        "2": node("Number", value=4),
        "3": node("Switch", first=first, a=["1", 0], b=["2", 0]),
        "4": node("Show", value=["3", 0]),
    }
    result = run(prompt, toys)
    assert toys["Show"].seen[0][1] == want
    assert skipped not in result.executed


def test_a_lazy_input_that_is_not_linked_cannot_be_asked_for(toys):
    prompt = {
        "1": node("Number", value=3),
        "3": node("Switch", first=False, a=["1", 0]),
        "4": node("Show", value=["3", 0]),
    }
    with pytest.raises(NodeFailed, match=r"asks for 'b', which is not linked"):
        run(prompt, toys)


def test_a_lazy_input_without_check_lazy_status_stays_none(toys):
    class Blind(toys["Switch"]):
        check_lazy_status = property()

    prompt = {
        "1": node("Number", value=3),
        "3": node("Blind", first=True, a=["1", 0], b=["1", 0]),
        "4": node("Show", value=["3", 0]),
    }
    assert shown_values(prompt, toys | {"Blind": Blind}) == [(None, None)]


def test_a_raw_link_is_passed_and_its_source_does_not_run(toys):
    prompt = {
        "1": node("Fail", how="raise"),
        "2": node("Raw", link=["1", 0]),
        "3": node("Show", value=["2", 0]),
    }
    assert shown_values(prompt, toys) == ["['1', 0]"]


def test_values_are_freed_after_their_last_reader(toys):
    prompt = {
        "blob": node("MakeBlob"),
        "first": node("BlobToNumber", blob=["blob", 0]),
        "second": node("BlobToNumber", blob=["blob", 0]),
        "between": node("CountBlobs", after=["first", 0]),
        "join": node("Join", a=["first", 0], b=["second", 0]),
        "after": node("CountBlobs", after=["join", 0]),
        "a": node("Show", value=["between", 0]),
        "b": node("Show", value=["after", 0]),
    }
    assert shown_values(prompt, toys) == [1, 0]


def test_values_that_only_a_skipped_branch_would_read_are_freed(toys):
    prompt = {
        "blob": node("MakeBlob"),
        "use": node("BlobToNumber", blob=["blob", 0]),
        "unused": node("BlobToNumber", blob=["blob", 0]),
        "switch": node("Switch", first=True, a=["use", 0], b=["unused", 0]),
        "after": node("CountBlobs", after=["switch", 0]),
        "out": node("Show", value=["after", 0]),
    }
    assert shown_values(prompt, toys) == [0]


def test_everything_runs_in_inference_mode_under_the_given_host(toys):
    class Where(toys["Number"]):
        def go(self, value):
            return ((torch.is_inference_mode_enabled(), host()),)

    standalone = StandaloneHost(progress="quiet")
    prompt = {"1": node("Where", value=1), "2": node("Show", value=["1", 0])}
    run(prompt, toys | {"Where": Where}, standalone)
    assert toys["Show"].seen[0][1] == (True, standalone)
    assert not torch.is_inference_mode_enabled()
    assert host() is not standalone


def test_a_failing_node_is_named_with_its_title_and_cause(toys):
    prompt = {"5": node("Fail", "My GPUs", how="raise"), "6": node("Show", value=["5", 0])}
    with pytest.raises(NodeFailed, match=r"node 5 \(Fail 'My GPUs'\): 3 GPUs cannot share 32 heads") as raised:
        run(prompt, toys)
    assert (raised.value.node_id, raised.value.class_type) == ("5", "Fail")
    assert isinstance(raised.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("how", "message"),
    [("arity", "returned 2 values, but declares 1"), ("scalar", "returned int"), ("expand", "does not support")],
)
def test_wrong_returns_are_refused(toys, how, message):
    with pytest.raises(NodeFailed, match=message):
        run({"5": node("Fail", how=how), "6": node("Show", value=["5", 0])}, toys)


def test_an_interrupt_takes_effect_between_nodes(toys):
    standalone = StandaloneHost(progress="quiet")

    class Stop(toys["Number"]):
        def go(self, value):
            standalone.interrupt()
            return (value,)

    prompt = {"1": node("Stop", value=1), "2": node("Show", value=["1", 0])}
    with pytest.raises(Interrupted):
        run(prompt, toys | {"Stop": Stop}, standalone)
    assert toys["Show"].seen == []
    run({"2": node("Show", value=1)}, toys, standalone)
    assert len(toys["Show"].seen) == 1


def test_a_long_chain_runs(toys):
    prompt = {"0": node("Number", value=1)}
    for step in range(1, 5000):
        prompt[str(step)] = node("Number", value=[str(step - 1), 0])
    prompt["out"] = node("Show", value=["4999", 0])
    result = execute(prompt, toys, StandaloneHost(progress="quiet"))
    assert result.outputs == {"out": {"value": [1]}}


def test_events_tell_the_story_in_order(toys, tmp_path):
    class Save(toys["Show"]):
        RETURN_TYPES = ()

        @classmethod
        def go(cls, value, **hidden):
            with host().progress(2, "saving") as progress:
                progress.step(2)
            return {"ui": {"images": [{"filename": "a.png", "subfolder": "s", "type": "output"}]}}

    events = []

    def on_event(type, **fields):
        events.append((type, fields))

    standalone = StandaloneHost(progress="json", output_dir=tmp_path, on_event=on_event)
    prompt = {"1": node("Number", value=1), "2": node("Save", value=["1", 0])}
    result = run(prompt, toys | {"Save": Save}, standalone, on_event=on_event)
    assert result.files == [tmp_path / "s" / "a.png"]
    assert events == [
        ("executing", {"node": "1", "class_type": "Number"}),
        ("executed", {"node": "1"}),
        ("executing", {"node": "2", "class_type": "Save"}),
        ("progress", {"node": "2", "completed": 0, "total": 2}),
        ("progress", {"node": "2", "completed": 2, "total": 2}),
        ("output", {"node": "2", "path": str(tmp_path / "s" / "a.png"), "folder": "output"}),
        ("executed", {"node": "2"}),
    ]


SAME_IN_COMFYUI = {
    "diamond": {
        "1": node("Number", value=2),
        "2": node("Join", a=["1", 0], b=["1", 0]),
        "3": node("Show", value=["2", 0]),
        "4": node("Show", value=["1", 0]),
    },
    "converted": {"1": node("Number", value="3", scale="2"), "2": node("Show", value=["1", 0])},
    "async_and_slots": {"1": node("Thing"), "2": node("Show", value=["1", 1]), "3": node("Show", value=["1", 0])},
    "spread": {
        "1": node("Spread", count=4),
        "2": node("Spread", count=2),
        "3": node("Join", a=["1", 0], b=["2", 0]),
        "4": node("Show", value=["3", 0]),
        "5": node("Show", value=["1", 1]),
    },
    "gather": {
        "1": node("Spread", count=4),
        "2": node("Gather", values=["1", 0], plus=10),
        "3": node("Show", value=["2", 0]),
    },
    "lazy": {
        "1": node("Number", value=3),
        "2": node("Fail", how="raise"),
        "3": node("Switch", first=True, a=["1", 0], b=["2", 0]),
        "4": node("Show", value=["3", 0]),
    },
    "raw_link": {"1": node("Number", value=3), "2": node("Raw", link=["1", 0]), "3": node("Show", value=["2", 0])},
    "wrapped_list": {"2": node("Show", value={"__value__": [1, 2, 3]})},
}


@pytest.mark.comfy
@pytest.mark.parametrize("name", SAME_IN_COMFYUI)
def test_comfyui_gives_the_same_results(name, toys, comfy, monkeypatch):
    execution, nodes = comfy
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", toys)
    prompt = SAME_IN_COMFYUI[name]
    theirs = copy.deepcopy(prompt)
    accepted, _, outputs, _ = asyncio.run(execution.validate_prompt("id", theirs, None))
    assert accepted
    server = types.SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *message: None)
    sizes = {"ram": 0, "ram_inactive": 0, "lru": 0}
    executor = execution.PromptExecutor(server, cache_type=execution.CacheType.CLASSIC, cache_args=sizes)
    executor.execute(theirs, "id", {}, outputs)
    assert executor.success
    assert run(prompt, toys).outputs == executor.history_result["outputs"]
