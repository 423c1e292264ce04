"""For which model a LoRA was made, told from its names and shapes: against mistakes, and for messages.

LoRAs seldom say it themselves. Some layers and sizes exist in one generation only; attention alone looks the same in
LTX-2.0, 2.3 and the 13B model of LTX-Video 0.9.x, and then nobody can tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ...config.version import ModelVersion

Shape = tuple[int, ...]

V2_0, V2_3 = "LTX-2.0 (19B)", "LTX-2.3 (22B) or later"
OLD_2B, OLD_13B = "LTX-Video 0.9.x (2B)", "LTX-Video 0.9.x (13B)"
_ALL = frozenset((V2_0, V2_3, OLD_2B, OLD_13B))
_OLD = frozenset((OLD_2B, OLD_13B))

# parts of our names: of layers and tables that the generation from 2.3 on has alone, and that it has no longer
_NEW = (".to_gate_logits", ".prompt_adaln.", ".prompt_scale_shift_table")
_GONE = (".caption_projection.",)
# rows of a block's modulation
_NEW_ROWS, _FORMER_ROWS = 9, 6
_OLD_2B_WIDTH = 2048

# parts of names in LoRAs of other models, words parted by dots or underscores -> the model
_OTHERS = (
    ("(double_blocks|single_blocks|single_transformer_blocks)", "Flux or HunyuanVideo"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)", "a Stable Diffusion U-Net"),
    (r"blocks[._]\d+[._](self_attn|cross_attn|ffn)", "Wan"),
    (r"transformer_blocks[._]\d+[._](attn|img_mlp|txt_mlp)", "Qwen-Image or another image model"),
)


def other_model(layers: Iterable[str]) -> str | None:
    """The model, not of the LTX family, whose layers have such names in a LoRA file; None when not known."""
    names = list(layers)
    for pattern, model in _OTHERS:
        part = re.compile(rf"(^|[._]){pattern}[._]")
        if any(part.search(name) for name in names):
            return model
    return None


def made_for(shapes: Mapping[str, Shape], stated: ModelVersion | None = None) -> tuple[str, ...]:
    """The generations that a LoRA can have been made for; empty when nothing tells.

    shapes: our name of a layer -> shape of the weight that it is for. stated: the version in the file's metadata.
    """
    possible = set(_ALL)
    for evidence in (_by_version(stated), _by_layers(shapes), _by_rows(shapes), _by_width(shapes)):
        possible &= evidence
    # nothing tells, or everything contradicts itself
    return () if possible == _ALL else tuple(sorted(possible))


def generation(parameters: Iterable[str]) -> str | None:
    """``V2_0`` or ``V2_3`` for a model with parameters of these names; None when they do not tell."""
    found = _by_layers(parameters)
    return V2_3 if found == {V2_3} else V2_0 if V2_3 not in found else None


def _by_version(stated: ModelVersion | None) -> frozenset[str]:
    if stated is None or stated.numbers[0] == 1:
        return _ALL
    if stated.numbers[0] == 0:
        return _OLD
    return frozenset((V2_3 if stated.at_least(2, 3) else V2_0,))


def _by_layers(names: Iterable[str]) -> frozenset[str]:
    dotted = [f".{name}" for name in names]
    if any(mark in name for name in dotted for mark in _NEW):
        return frozenset((V2_3,))
    possible = _ALL
    if any(mark in name for name in dotted for mark in _GONE):
        possible -= {V2_3}
    if any(".audio." in name or ".cross_" in name for name in dotted):
        possible -= _OLD
    return possible


def _by_rows(shapes: Mapping[str, Shape]) -> frozenset[str]:
    """The timestep's layer makes all rows of the modulation, each as wide as its own input."""
    shape = shapes.get("video.adaln.linear", ())
    if len(shape) != 2 or shape[0] not in (_NEW_ROWS * shape[1], _FORMER_ROWS * shape[1]):
        return _ALL
    return frozenset((V2_3,)) if shape[0] == _NEW_ROWS * shape[1] else _ALL - {V2_3}


def _by_width(shapes: Mapping[str, Shape]) -> frozenset[str]:
    """The inputs of self attention are as many as the video's channels."""
    widths = {shape[1] for name, shape in shapes.items() if ".video.attn1.to_" in name and len(shape) == 2}
    return _ALL if not widths else frozenset((OLD_2B,)) if widths == {_OLD_2B_WIDTH} else _ALL - {OLD_2B}
