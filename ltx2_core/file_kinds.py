"""What a model file is, told from its header: the parts of a model that it holds, and the release they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config.version import TRANSFORMER_PREFIX, ModelVersion, is_lora, layout, looks_like
from .loading.keymap import module_name

if TYPE_CHECKING:
    from .loading.checkpoint import Checkpoint

TRANSFORMER, CONNECTORS, PROJECTION = "transformer", "connectors", "text projection"
VIDEO_VAE, AUDIO_VAE, VOCODER = "video VAE", "audio VAE", "vocoder"
TEXT_ENCODER, VISION, ASSETS = "text encoder", "vision encoder", "tokenizer and settings"
UPSAMPLER, DURATION_HEAD, LORA = "upsampler", "duration head", "LoRA"
FULL_CHECKPOINT, UNKNOWN = "full checkpoint", "unknown"

# everything of LTX-2 that a generation needs
MODEL_PARTS = (TRANSFORMER, CONNECTORS, PROJECTION, VIDEO_VAE, AUDIO_VAE, VOCODER)

# part -> how the names of its tensors begin; the first that fits counts
_BEGINNINGS = (
    (PROJECTION, ("text_embedding_projection.",)),
    (DURATION_HEAD, ("duration_head.", TRANSFORMER_PREFIX + "duration_head.")),
    (VIDEO_VAE, ("vae.", "encoder.", "decoder.", "per_channel_statistics.")),
    (AUDIO_VAE, ("audio_vae.",)),
    (VOCODER, ("vocoder.",)),
    (
        UPSAMPLER,
        ("initial_conv.", "initial_norm.", "res_blocks.", "upsampler.", "post_upsample_res_blocks.", "final_conv."),
    ),
    (TEXT_ENCODER, ("model.embed_tokens.", "model.layers.", "model.norm.", "language_model.", "model.language_model.")),
    (TEXT_ENCODER, ("token_embd.", "blk.", "output_norm.")),
    (VISION, ("vision_model.", "vision_tower.", "multi_modal_projector.", "audio_projector.")),
    (VISION, ("model.vision_tower.", "model.multi_modal_projector.")),
    (ASSETS, ("spiece_model", "tokenizer_json", "hf_asset__")),
)
# a file is named after the first of these that it holds
_RANKED = (TRANSFORMER, TEXT_ENCODER, VIDEO_VAE, AUDIO_VAE, VOCODER, PROJECTION, CONNECTORS, UPSAMPLER, DURATION_HEAD)


@dataclass(frozen=True)
class Release:
    """The release of LTX-2 that a file belongs to.

    certain: stated by the file or told by its transformer; else its layout alone is known, which 2.3 and 2.5 share.
    """

    version: ModelVersion
    certain: bool

    def __str__(self) -> str:
        shared = not self.certain and self.version.at_least(2, 3)
        return "LTX-2.3 or 2.5" if shared else f"LTX-{self.version.label}"


def part_of(name: str) -> str | None:
    """The part of a model that a tensor belongs to, by its name in a file; None for a name of no known part."""
    for part, starts in _BEGINNINGS:
        if name.startswith(starts):
            return part
    if module_name("transformer", name) is not None:
        return TRANSFORMER
    return CONNECTORS if module_name("text_head", name) is not None else None


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Part -> its tensors, of the tensors with a known part."""
    found: dict[str, list[str]] = {}
    for name in names:
        part = part_of(name)
        if part is not None:
            found.setdefault(part, []).append(name)
    return found


def kind_of(file: Checkpoint) -> str:
    """``FULL_CHECKPOINT``, ``LORA``, the file's foremost part, or ``UNKNOWN``."""
    if is_lora(file.tensors):
        return LORA
    parts = parts_of(file.tensors)
    if all(part in parts for part in MODEL_PARTS):
        return FULL_CHECKPOINT
    return next((part for part in _RANKED if part in parts), UNKNOWN)


def has_diffusion_decoder(file: Checkpoint) -> bool:
    """Whether a file's video VAE is the one of LTX-2.5 whose decoder is a diffusion model."""
    return any(name.endswith("decoder.conv_in_x_t.weight") for name in file.tensors)


def release_of(file: Checkpoint) -> Release | None:
    """The release that a file states, or that its tensors tell; None where neither does."""
    stated = ModelVersion.from_metadata(file.metadata)
    if stated is not None:
        return Release(stated, certain=True)
    try:
        label = layout(file.metadata, file.shapes)
    except ValueError:  # a transformer of no released version
        return None
    version = None if label is None else ModelVersion.parse(label)
    return None if version is None else Release(version, certain=TRANSFORMER in parts_of(file.tensors))


def describe(file: Checkpoint) -> str:
    """What a file is, for messages: "transformer with connectors of LTX-2.3"."""
    kind = kind_of(file)
    if kind in (LORA, UNKNOWN):
        return looks_like(file.metadata, file.shapes)
    parts = parts_of(file.tensors)
    beside = [part for part in _RANKED if part in parts and part != kind] if kind != FULL_CHECKPOINT else []
    release = release_of(file)
    held = f" with {' and '.join(beside)}" if beside else ""
    return f"{kind}{held}" + (f" of {release}" if release is not None else "")
