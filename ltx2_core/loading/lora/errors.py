"""The error of unusable LoRAs, and how names stand in messages: files are untrusted, so names are quoted and cut."""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint import Checkpoint, CheckpointError

_SHOWN = 6
_LENGTH = 120

FITS = (
    "What fits: a LoRA trained for an LTX-2 transformer of this model's version, with tensors such as "
    "diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight"
)


class LoraError(CheckpointError):
    """A LoRA cannot be used; the message names the file, what was found and what would fit."""


def lora_error(checkpoint: Checkpoint, problem: str, remedy: str) -> LoraError:
    return LoraError(f"{checkpoint.path}: {problem}: {remedy}")


def shown(text: str) -> str:
    return repr(text if len(text) <= _LENGTH else text[:_LENGTH] + "...")


def first(texts: Sequence[str], separator: str = ", ") -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return separator.join(texts[:_SHOWN]) + more


def quoted(names: Sequence[str]) -> str:
    return first([shown(name) for name in names])
