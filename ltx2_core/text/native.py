"""ComfyUI's native conditioning for LTX-2, split into its video and audio parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..av import AV
from ..config.text import TextConfig
from .connector import MIN_TOKENS

# Set by the native text encoder on features that have not been through the connectors.
_RAW_FLAG = "unprocessed_ltxav_embeds"


class ConditioningError(ValueError):
    """A conditioning does not fit the loaded model."""


class NativeText(NamedTuple):
    """Text taken from a conditioning.

    parts: features [1, S, C] when ``needs_connector``, contexts [1, T, C] otherwise; one tensor twice where both
        streams share their features (2.0).
    mask: [1, S], all True (padding has been removed); None for contexts.
    """

    parts: AV[Tensor]
    needs_connector: bool
    mask: Tensor | None


def split_conditioning(conditioning: Any, config: TextConfig) -> NativeText:
    """Take the text out of a ComfyUI CONDITIONING, a list of one ``[tensor, dict]``.

    Raw and processed tensors of 2.3 and 2.5 have the same width; the native encoder's flag tells them apart. The other
    entries of the dict are the caller's business.
    Raises ConditioningError for several entries, a batch, a width of another model version, processed text of a
    length that no connector yields (a raw conditioning that lost its flag), and masked processed text.
    """
    embeds, extras = _single_entry(conditioning)
    raw = extras.get(_RAW_FLAG) is True
    _check_width(embeds, raw, config)
    mask = _mask(extras, embeds)
    if raw:
        kept = embeds if mask is None else embeds[:, mask[0]]
        if kept.shape[1] == 0:
            raise ConditioningError("the conditioning has no tokens: its tensor is empty or its mask is all zeros")
        return NativeText(
            _split(kept, raw, config), True, torch.ones(kept.shape[:2], dtype=torch.bool, device=kept.device)
        )
    _check_processed(embeds, mask, config)
    return NativeText(_split(embeds, raw, config), False, None)


def _single_entry(conditioning: Any) -> tuple[Tensor, dict[str, Any]]:
    if not isinstance(conditioning, list | tuple) or not conditioning:
        raise ConditioningError("the conditioning is empty; connect the output of a text encoding node")
    if len(conditioning) > 1:
        raise ConditioningError(
            f"the conditioning has {len(conditioning)} entries; LTX-2 takes one prompt, so remove nodes that combine "
            "conditionings or schedule them in time"
        )
    entry = conditioning[0]
    if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], dict):
        raise ConditioningError("the conditioning's entry is not a pair of a tensor and a dictionary")
    embeds, extras = entry
    if not isinstance(embeds, Tensor) or embeds.ndim != 3 or embeds.shape[0] != 1 or not embeds.is_floating_point():
        found = f"{embeds.dtype} {tuple(embeds.shape)}" if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ConditioningError(f"the conditioning holds {found}; needed are floats of shape (1, tokens, width)")
    return embeds, extras


def _check_width(embeds: Tensor, raw: bool, config: TextConfig) -> None:
    allowed = _raw_width(config) if raw else _processed_width(config)
    if embeds.shape[-1] == allowed:
        return
    version = "2.3 or 2.5" if config.per_modality_projection else "2.0"
    state = "before" if raw else "after"
    hint = ""
    if not raw and embeds.shape[-1] == _raw_width(config):
        hint = f"; this width is the one before the connectors, but the {_RAW_FLAG} flag is missing: encode again"
    raise ConditioningError(
        f"the conditioning is {embeds.shape[-1]} wide ({state} the connectors); the loaded model is of version {version} "
        f"and takes {_raw_width(config)} before and {_processed_width(config)} after the connectors. Use a text encoder "
        f"made for it{hint}"
    )


def _check_processed(embeds: Tensor, mask: Tensor | None, config: TextConfig) -> None:
    tokens, registers = embeds.shape[1], config.connectors.video.num_registers
    if tokens < MIN_TOKENS or tokens % registers:
        raise ConditioningError(
            f"the conditioning counts as processed by the connectors (it has no {_RAW_FLAG} flag), but has {tokens} "
            f"tokens; processed text has {MIN_TOKENS} or a larger multiple of {registers}. Saving a conditioning loses "
            "the flag: encode the prompt again"
        )
    if mask is not None and not bool(mask.all()):
        raise ConditioningError("the conditioning masks part of its processed text; LTX-2 attends to all of it")


def _mask(extras: dict[str, Any], embeds: Tensor) -> Tensor | None:
    mask = extras.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.numel() != embeds.shape[1]:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ConditioningError(f"the conditioning's attention_mask is {found}; needed is (1, {embeds.shape[1]})")
    return mask.reshape(1, -1).to(embeds.device) != 0


def _split(embeds: Tensor, raw: bool, config: TextConfig) -> AV[Tensor]:
    if raw and not config.per_modality_projection:
        return AV(embeds, embeds)
    return AV(*embeds.split((config.widths.video, config.widths.audio), dim=-1))


def _raw_width(config: TextConfig) -> int:
    return _processed_width(config) if config.per_modality_projection else config.feature_dim


def _processed_width(config: TextConfig) -> int:
    return config.widths.video + config.widths.audio
