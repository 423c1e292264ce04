"""Names of tensors in released checkpoints, and what the same tensors are called in our modules.

The checkpoint's transformer has flat twin names (``attn1``, ``audio_attn1``); ours nests them (``video.attn1``,
``audio.attn1``). Only the first part of a name, or the first part after the block's number, is ever renamed, by
tables that are one to one, so no rule can shadow another.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..config.version import TRANSFORMER_PREFIX as _TRANSFORMER

_CONNECTORS = (
    (_TRANSFORMER + "video_embeddings_connector.", "connectors.video."),
    (_TRANSFORMER + "audio_embeddings_connector.", "connectors.audio."),
)
_VAE_STATISTICS = ("vae.per_channel_statistics.", "per_channel_statistics.")
_AUDIO_STATISTICS = ("audio_vae.per_channel_statistics.", "per_channel_statistics.")

# component -> pairs of (prefix in the checkpoint, prefix in the module)
COMPONENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "transformer": ((_TRANSFORMER, ""),),
    "video_encoder": (("vae.encoder.", ""), _VAE_STATISTICS),
    "video_decoder": (("vae.decoder.", ""), _VAE_STATISTICS),
    "audio_encoder": (("audio_vae.encoder.", ""), _AUDIO_STATISTICS),
    "audio_decoder": (("audio_vae.decoder.", ""), _AUDIO_STATISTICS),
    "vocoder": (("vocoder.", ""),),
    "text_head": (("text_embedding_projection.", "projection."), *_CONNECTORS),
    "upsampler": (("", ""),),
}

# under the transformer's prefix, but parts of other components
_NOT_TRANSFORMER = (*(prefix for prefix, _ in _CONNECTORS), _TRANSFORMER + "duration_head.")
# split files hold the transformer and the video VAE with or without their prefixes
_BARE_VAE = ("encoder.", "decoder.", "per_channel_statistics.")
# older files carry further statistics that nothing uses
_STATISTICS = ("mean-of-means", "std-of-means")

_STREAM_PARTS = {
    "patchify_proj": "patchify_proj",
    "adaln_single": "adaln",
    "prompt_adaln_single": "prompt_adaln",
    "scale_shift_table": "scale_shift_table",
    "proj_out": "proj_out",
    "caption_projection": "caption_projection",
}
_TOP = {
    **{name: f"video.{ours}" for name, ours in _STREAM_PARTS.items()},
    **{f"audio_{name}": f"audio.{ours}" for name, ours in _STREAM_PARTS.items()},
    "keyframes_abs_pos_embedding": "video.keyframes_abs_pos_embedding",
    "av_ca_video_scale_shift_adaln_single": "video.cross_adaln",
    "av_ca_audio_scale_shift_adaln_single": "audio.cross_adaln",
    "av_ca_a2v_gate_adaln_single": "video.cross_gate_adaln",
    "av_ca_v2a_gate_adaln_single": "audio.cross_gate_adaln",
}
_BLOCK_PARTS = ("attn1", "attn2", "ff", "scale_shift_table", "prompt_scale_shift_table")
_BLOCK = {
    **{name: f"video.{name}" for name in _BLOCK_PARTS},
    **{f"audio_{name}": f"audio.{name}" for name in _BLOCK_PARTS},
    "audio_to_video_attn": "video.cross_attn",
    "video_to_audio_attn": "audio.cross_attn",
    "scale_shift_table_a2v_ca_video": "video.cross_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio.cross_scale_shift_table",
}
_BARE_TRANSFORMER = {*_TOP, "transformer_blocks", "video_embeddings_connector", "audio_embeddings_connector"}
_TOP_BACK = {ours: name for name, ours in _TOP.items()}
_BLOCK_BACK = {ours: name for name, ours in _BLOCK.items()}


def module_names(component: str, checkpoint_names: Iterable[str]) -> dict[str, str]:
    """Checkpoint name -> name in the component's module, for those names that belong to the component.

    A name under the component's prefix that no released transformer has keeps its full checkpoint name, so that strict
    loading reports it.
    """
    pairs = ((name, module_name(component, name)) for name in checkpoint_names)
    return {name: ours for name, ours in pairs if ours is not None}


def module_name(component: str, name: str) -> str | None:
    """The name in the component's module of one tensor of a checkpoint; None when it belongs to something else."""
    full = _prefixed(component, name)
    for prefix, ours in COMPONENTS[component]:
        if not full.startswith(prefix):
            continue
        rest = full.removeprefix(prefix)
        if component == "transformer":
            return None if full.startswith(_NOT_TRANSFORMER) else transformer_module_name(rest) or name
        if ours == "per_channel_statistics." and rest not in _STATISTICS:
            return None
        return ours + rest
    return None


def _prefixed(component: str, name: str) -> str:
    if component in ("video_encoder", "video_decoder") and name.startswith(_BARE_VAE):
        return "vae." + name
    if component in ("transformer", "text_head") and name.partition(".")[0] in _BARE_TRANSFORMER:
        return _TRANSFORMER + name
    return name


def checkpoint_name(component: str, name: str) -> str:
    """The released checkpoint's name of a tensor of the component's module: the inverse of ``module_name``.

    Raises ValueError for a name that no checkpoint has.
    """
    if component == "transformer":
        found = transformer_checkpoint_name(name)
        if found is not None:
            return _TRANSFORMER + found
    else:
        # longest first: the empty prefix fits every name
        for prefix, ours in sorted(COMPONENTS[component], key=lambda pair: -len(pair[1])):
            if name.startswith(ours):
                return prefix + name.removeprefix(ours)
    raise ValueError(f"{name!r} of the {component} has no name in a checkpoint")


def transformer_module_name(name: str) -> str | None:
    """Name of a transformer tensor or module in ours, given its checkpoint name without prefix; None when unknown.

    Works for whole names and for names of modules ("transformer_blocks.3.audio_attn1.to_q"), as LoRA files use them.
    """
    parts = name.split(".")
    if parts[0] == "transformer_blocks" and len(parts) > 2:
        return _renamed(_BLOCK, ["blocks", parts[1]], parts[2:3], parts[3:])
    return _renamed(_TOP, [], parts[:1], parts[1:])


def transformer_checkpoint_name(name: str) -> str | None:
    """The inverse of ``transformer_module_name``."""
    parts = name.split(".")
    if parts[0] == "blocks" and len(parts) > 3:
        return _renamed(_BLOCK_BACK, ["transformer_blocks", parts[1]], parts[2:4], parts[4:])
    return _renamed(_TOP_BACK, [], parts[:2], parts[2:])


def _renamed(table: dict[str, str], before: list[str], head: list[str], rest: list[str]) -> str | None:
    new = table.get(".".join(head))
    return None if new is None else ".".join([*before, new, *rest])
