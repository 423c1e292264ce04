"""Toy nodes: small classes that use every part of the node contract."""

import gc
import os
import pathlib
import sys
import weakref

import pytest


class Number:
    RETURN_TYPES = ("INT",)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"value": ("INT", {"default": 1, "min": 0, "max": 10})},
            "optional": {"scale": ("FLOAT", {"default": 1.0, "min": -2.0, "max": 2.0})},
        }

    def go(self, value, scale=1.0):
        return (int(value * scale),)


class Typed:
    """One input of every constant type."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "text": ("STRING", {"default": ""}),
                "flag": ("BOOLEAN", {"default": False}),
                "choice": ("COMBO", {"options": ["a", "2.3"]}),
                "old": (["x", "y"],),
                "real": ("FLOAT", {"default": 0.0}),
            },
            "optional": {"many": ("COMBO", {"options": ["a", "b", "c"], "multiselect": True})},
        }

    def go(self, **values):
        return (repr(sorted(values.items())),)


class Checked:
    """Checks ``value`` itself, so that its range does not count; ``other`` keeps its range."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        small = ("INT", {"min": 0, "max": 10})
        return {"required": {"value": small, "other": small}}

    @classmethod
    def VALIDATE_INPUTS(cls, value):
        if value == 13:
            raise RuntimeError("thirteen")
        return True if value is None or value % 2 else f"{value} is even"

    def go(self, value, other):
        return (value + other,)


class AnyType:
    """Checks link types itself."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {}), "b": ("INT", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True if set(input_types.values()) <= {"INT", "STRING"} else f"got {sorted(input_types.values())}"

    def go(self, a, b):
        return (a,)


class Join:
    """Sockets, a union and an optional socket."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"a": ("INT", {"forceInput": True}), "b": ("INT,FLOAT", {})},
            "optional": {"thing": ("THING", {})},
        }

    @staticmethod
    def go(a, b, thing=None):
        return (a + b,)


class Thing:
    RETURN_TYPES = ("THING", "INT")
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    @classmethod
    async def go(cls):
        return ("thing", 5)


class Show:
    """Records what it gets, with the hidden inputs."""

    RETURN_TYPES = ()
    FUNCTION = "go"
    OUTPUT_NODE = True
    seen = []

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"value": ("*", {})},
            "hidden": {"node_id": "UNIQUE_ID", "prompt": "PROMPT", "extra": "EXTRA_PNGINFO", "dyn": "DYNPROMPT"},
        }

    @classmethod
    def go(cls, value, node_id=None, prompt=None, extra=None, dyn=None):
        cls.seen.append((node_id, value, prompt, extra, dyn))
        return {"ui": {"value": [value]}}


class Spread:
    """One list becomes many values."""

    RETURN_TYPES = ("INT", "STRING")
    OUTPUT_IS_LIST = (True, False)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": ("INT", {"min": 0, "max": 9})}}

    @classmethod
    def go(cls, count):
        return (list(range(count)), "once")


class Gather:
    """Many values become one list."""

    RETURN_TYPES = ("INT",)
    INPUT_IS_LIST = True
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"values": ("INT", {}), "plus": ("INT", {})}}

    @classmethod
    def go(cls, values, plus):
        assert isinstance(plus, list)
        return (sum(values) + plus[0],)


class Switch:
    """Evaluates only the chosen branch."""

    RETURN_TYPES = ("*",)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        lazy = ("*", {"lazy": True})
        return {"required": {"first": ("BOOLEAN", {})}, "optional": {"a": lazy, "b": lazy}}

    def check_lazy_status(self, first, a=None, b=None):
        return ["a"] if first else ["b"]

    def go(self, first, a=None, b=None):
        return ((a, b),)


class Fail:
    RETURN_TYPES = ("INT",)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"how": ("STRING", {})}}

    def go(self, how):
        if how == "raise":
            raise ValueError("3 GPUs cannot share 32 heads")
        return {"arity": (1, 2), "scalar": 7, "expand": {"expand": {}, "result": (1,)}}[how]


class Raw:
    """Receives the link itself."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"link": ("*", {"rawLink": True})}}

    def go(self, link):
        return (repr(link),)


class Preset:
    """A preset widget that fills numbers."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "preset": ("COMBO", {"options": ["low", "high"]}),
                "cfg": ("FLOAT", {"min": 0.0, "max": 20.0}),
                "stg": ("FLOAT", {"min": 0.0, "max": 20.0}),
            }
        }

    @classmethod
    def fill(cls, name, value):
        return (
            {"low": {"cfg": 1.0, "stg": 0.0}, "high": {"cfg": 4.0, "stg": 1.0}}.get(value, {})
            if name == "preset"
            else {}
        )

    def go(self, preset, cfg, stg):
        return (f"{preset} {cfg} {stg}",)


class Blob:
    """A value that counts how many of its kind are alive."""

    alive = weakref.WeakSet()

    def __init__(self):
        Blob.alive.add(self)


class MakeBlob:
    RETURN_TYPES = ("BLOB",)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "optional": {"after": ("*", {})}}

    def go(self, after=None):
        return (Blob(),)


class CountBlobs:
    """How many are alive after its input."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": ("*", {})}}

    def go(self, after):
        gc.collect()
        return (len(Blob.alive),)


class BlobToNumber:
    RETURN_TYPES = ("INT",)
    FUNCTION = "go"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"blob": ("BLOB", {})}}

    def go(self, blob):
        return (1,)


TOYS = {
    toy.__name__: toy
    for toy in (
        Number, Typed, Checked, AnyType, Join, Thing, Show, Spread, Gather, Switch, Fail, Raw, Preset,
        MakeBlob, CountBlobs, BlobToNumber,
    )
}  # fmt: skip


@pytest.fixture
def toys():
    Show.seen.clear()
    Blob.alive.clear()
    return dict(TOYS)


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI's ``execution`` and ``nodes`` modules, in process, without a server."""
    root = pathlib.Path(os.environ.get("COMFYUI_PATH", pathlib.Path.home() / "comfy" / "ComfyUI"))
    if not (root / "execution.py").is_file():
        pytest.skip("no ComfyUI tree (set COMFYUI_PATH)")
    before = set(sys.modules)
    sys.path.insert(0, str(root))
    try:
        from comfy.cli_args import args

        args.cpu = True
        import execution

        import nodes

        yield execution, nodes
    except ImportError as error:
        pytest.skip(f"ComfyUI's requirements are not installed: {error}")
    finally:
        sys.path.remove(str(root))
        # the pack takes a loaded ComfyUI for its host, so no later test may see it
        for name in set(sys.modules) - before:
            top = name.partition(".")[0]
            if (root / top).is_dir() or (root / f"{top}.py").is_file():
                del sys.modules[name]
