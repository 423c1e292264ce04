import pytest
from ltx2_engine.nodes.runner.options import OptionError, apply_settings

PROMPT = {
    "3": {"class_type": "Number", "inputs": {"value": 1}, "_meta": {"title": "Stage 1.5"}},
    "4": {"class_type": "Number", "inputs": {"value": 2}, "_meta": {"title": "Seed"}},
    "7:2": {"class_type": "Typed", "inputs": {"text": "a"}},
    "8": {"class_type": "Join", "inputs": {"a": ["3", 0], "b": ["4", 0]}},
    "9": {"class_type": "Preset", "inputs": {"preset": "low", "cfg": ["3", 0], "stg": 0.5}},
    "10": {"class_type": "Thing"},
}


@pytest.mark.parametrize(
    ("text", "node_id", "name", "value"),
    [
        ("3.value=7", "3", "value", 7),
        ("Seed.value=7", "4", "value", 7),
        ("Stage 1.5.value=7", "3", "value", 7),
        ("7:2.text=hello = world", "7:2", "text", "hello = world"),
        ("Typed.text=123", "7:2", "text", "123"),
        ("Typed.text=1e3", "7:2", "text", "1e3"),
        ('Typed.text=["3", 0]', "7:2", "text", '["3", 0]'),
        ('Typed.text="quoted\\n"', "7:2", "text", "quoted\n"),
        ("Typed.text=", "7:2", "text", ""),
        ("Typed.choice=2.3", "7:2", "choice", "2.3"),
        ("Typed.choice=a", "7:2", "choice", "a"),
        ('Typed.choice="a"', "7:2", "choice", "a"),
        ('Typed.many=["a","b"]', "7:2", "many", {"__value__": ["a", "b"]}),
        ("Typed.flag=false", "7:2", "flag", False),
        ("Typed.flag=True", "7:2", "flag", True),
        ("Typed.real=1e-3", "7:2", "real", 1e-3),
        ("8.a=3", "8", "a", 3),
    ],
)
def test_settings_find_their_node_and_type(toys, text, node_id, name, value):
    changed = apply_settings(PROMPT, toys, [text])
    assert changed[node_id]["inputs"][name] == value
    assert type(changed[node_id]["inputs"][name]) is type(value)
    assert [key for key in PROMPT if changed[key] != PROMPT[key]] in ([node_id], [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3.value", "must have the form"),
        ("value=3", "must have the form"),
        ("Nummer.value=3", r"no node is called 'Nummer'. Did you mean 'Number'\?.*3 \(Stage 1.5\)"),
        ("Number.value=3", r"stands for nodes 3 \(Stage 1.5\), 4 \(Seed\); use an id or a title"),
        ("3.seed=3", "node '3' has no input 'seed'. It has: value, scale"),
        ("8.thing=3", "takes a link of type THING"),
        ("Typed.flag=maybe", "a switch is"),
        ("10.x=1", "It has: none that can be set"),
    ],
)
def test_wrong_settings_list_what_is_legal(toys, text, message):
    with pytest.raises(OptionError, match=message):
        apply_settings(PROMPT, toys, [text])


def test_the_given_prompt_is_not_changed(toys):
    apply_settings(PROMPT, toys, ["3.value=9"])
    assert PROMPT["3"]["inputs"] == {"value": 1}


def test_a_preset_fills_its_numbers_but_not_links(toys):
    inputs = apply_settings(PROMPT, toys, ["9.preset=high"])["9"]["inputs"]
    assert inputs == {"preset": "high", "cfg": ["3", 0], "stg": 1.0}


@pytest.mark.parametrize("order", [["9.preset=high", "9.stg=0.25"], ["9.stg=0.25", "9.preset=high"]])
def test_an_explicit_value_wins_over_the_preset_in_any_order(toys, order):
    assert apply_settings(PROMPT, toys, order)["9"]["inputs"]["stg"] == 0.25


def test_a_link_can_be_replaced_explicitly(toys):
    assert apply_settings(PROMPT, toys, ["9.cfg=3", "9.preset=high"])["9"]["inputs"]["cfg"] == 3
