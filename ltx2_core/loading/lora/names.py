"""From the name of a tensor in a LoRA file to a layer of our transformer and the tensor's role.

A name is prefix + layer + suffix. Each trainer has its own prefix and suffixes, some also other names of layers; all of
it is tables here. Names with underscores for dots are looked up and never parsed, since names have underscores of their
own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from ..keymap import transformer_module_name

# names of one role -> role; each may be followed by one of _ENDS
_FACTORS = {
    "lora_A": "A",
    "lora_down": "A",
    "lora.down": "A",
    "lora_B": "B",
    "lora_up": "B",
    "lora.up": "B",
    "lora_mid": "mid",
    "lora_magnitude_vector": "magnitude",
}
_ENDS = ("", ".weight", ".default", ".default.weight")
_BIAS_ENDS = (".bias", ".default.bias")
# roles that files call by the same name
_PLAIN = (
    *("alpha", "dora_scale"),
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *("diff", "diff_b", "set_weight", "w_norm", "b_norm", "reshape_weight"),
)
_ROLES: Mapping[str, str] = {
    **{name: name for name in _PLAIN},
    **{name + end: role for name, role in _FACTORS.items() for end in _ENDS},
    **{name + end: "B_bias" for name, role in _FACTORS.items() if role == "B" for end in _BIAS_ENDS},
}
_LONGEST = max(suffix.count(".") for suffix in _ROLES) + 1
# another algebra, by how the last part of a name begins
_OTHERS = {"oft_": "OFT", "boft_": "BOFT"}
OTHER_KINDS = frozenset(_OTHERS.values())

_PEFT = "base_model.model."
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
_FLAT_PREFIXES = ("lora_unet_", "lycoris_")
_FLAT_BLOCK = re.compile(r"transformer_blocks_([0-9]+)_(.+)")

# diffusers 0.42's names of what it renames: the first part of a name, so that parts of other names ("audio_time_embed",
# "prompt_adaln") are never touched; a block's table; and the last part, of the norms in attention
_DIFFUSERS_TOP = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
_DIFFUSERS_LAST = {
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
}

# every layer and table of the transformer of any release, in the checkpoint's names: beginnings and ends
_BLOCK = "transformer_blocks.0."
_ADALN = ("adaln_single", "prompt_adaln_single")
_CROSS_ADALN = ("video_scale_shift", "audio_scale_shift", "a2v_gate", "v2a_gate")
_TABLES = ("scale_shift_table", "prompt_scale_shift_table")
_LAYERS = (
    (
        [_BLOCK + name for name in ("attn1", "attn2", "audio_attn1", "audio_attn2")]
        + [_BLOCK + name for name in ("audio_to_video_attn", "video_to_audio_attn")],
        (".to_q", ".to_k", ".to_v", ".to_out.0", ".to_gate_logits", ".q_norm", ".k_norm"),
    ),
    ([_BLOCK + "ff", _BLOCK + "audio_ff"], (".net.0.proj", ".net.2")),
    ([_BLOCK, _BLOCK + "audio_"], _TABLES),
    ([_BLOCK + "scale_shift_table_a2v_ca_"], ("video", "audio")),
    (["", "audio_"], ("patchify_proj", "proj_out", "scale_shift_table")),
    (["keyframes_abs_pos_embedding"], ("",)),
    (["caption_projection", "audio_caption_projection"], (".linear_1", ".linear_2")),
    (
        [*_ADALN, *(f"audio_{name}" for name in _ADALN), *(f"av_ca_{name}_adaln_single" for name in _CROSS_ADALN)],
        (".emb.timestep_embedder.linear_1", ".emb.timestep_embedder.linear_2", ".linear"),
    ),
)
# how the names of parameters end that belong to no layer
_OWN_PARAMETER = ("scale_shift_table", "keyframes_abs_pos_embedding")

_TEXT_HEAD = (
    "connectors.",
    "text_embedding_projection.",
    "text_proj_in",
    "aggregate_embed",
    "video_embeddings_connector.",
    "audio_embeddings_connector.",
)


def split(name: str) -> tuple[str, str] | None:
    """The layer's name in the file and the tensor's role; None for a tensor that is no part of a LoRA.

    Roles are "A", "B", "mid", "magnitude", "B_bias", and what files call by one name: "alpha", "dora_scale",
    "hada_w1_a", "lokr_w1", "diff", ... One of ``OTHER_KINDS`` stands for every tensor of another algebra.
    """
    parts = name.split(".")
    for count in range(min(_LONGEST, len(parts) - 1), 0, -1):
        role = _ROLES.get(".".join(parts[-count:]))
        if role is not None:
            return ".".join(parts[:-count]), role
    other = next((kind for beginning, kind in _OTHERS.items() if parts[-1].startswith(beginning)), None)
    return None if other is None or len(parts) == 1 else (".".join(parts[:-1]), other)


def module_name(name: str) -> str | None:
    """Our name of a layer or table of the transformer, given its name in a LoRA file; None for anything else."""
    name = name.removeprefix(_PEFT)
    flat = next((prefix for prefix in _FLAT_PREFIXES if name.startswith(prefix)), None)
    if flat is not None:
        found = _unflatten(name.removeprefix(flat))
        return None if found is None else transformer_module_name(found)
    return transformer_module_name(_released(_without_prefix(name)))


def why_not(name: str) -> str:
    """Why a layer in a file, of which ``module_name`` knows nothing, is not used."""
    if _without_prefix(name.removeprefix(_PEFT)).startswith(_TEXT_HEAD):
        return "a part of the text head: LoRAs are added to the transformer alone"
    return "not a part of the LTX-2 transformer"


def weight_name(layer: str) -> str:
    """Our name of the parameter that is a layer's weight; a table is its own."""
    return layer if layer.endswith(_OWN_PARAMETER) else f"{layer}.weight"


def bias_name(layer: str) -> str:
    return f"{layer}.bias"


def _without_prefix(name: str) -> str:
    return name.removeprefix(next((prefix for prefix in _PREFIXES if name.startswith(prefix)), ""))


def _released(name: str) -> str:
    """The checkpoint's name of a layer that may have diffusers' name."""
    parts = name.split(".")
    parts[0] = _DIFFUSERS_TOP.get(parts[0], parts[0])
    parts[-1] = _DIFFUSERS_LAST.get(parts[-1], parts[-1])
    return ".".join(parts)


def _unflatten(name: str) -> str | None:
    """A layer's checkpoint name from the one with underscores for dots."""
    block = _FLAT_BLOCK.fullmatch(name)
    if block is None:
        return _flat_names().get(name)
    found = _flat_names().get(f"transformer_blocks_0_{block[2]}")
    return None if found is None else found.replace(".0.", f".{block[1]}.", 1)


@cache
def _flat_names() -> Mapping[str, str]:
    """Name with underscores for dots, of the checkpoint or of diffusers -> checkpoint name, for block 0 and the rest."""
    released = [f"{name}{end}" for names, ends in _LAYERS for name in names for end in ends]
    return {flat.replace(".", "_"): name for name in released for flat in (name, _diffusers(name))}


def _diffusers(name: str) -> str:
    parts = name.split(".")
    top, last = ({ours: theirs for theirs, ours in table.items()} for table in (_DIFFUSERS_TOP, _DIFFUSERS_LAST))
    parts[0] = top.get(parts[0], parts[0])
    parts[-1] = last.get(parts[-1], parts[-1])
    return ".".join(parts)
