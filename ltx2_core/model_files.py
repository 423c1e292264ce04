"""The files of one model, and which of them holds which network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from .config.model import ModelConfig
from .config.version import ModelVersion
from .file_kinds import AUDIO_VAE, CONNECTORS, PROJECTION, TRANSFORMER, VIDEO_VAE, VOCODER, part_of
from .loading.checkpoint import Checkpoint
from .model_spec import ModelSpec
from .text.encoder_files import TextEncoderFiles

# network -> the parts of a model that its tensors are
NETWORK_PARTS: Mapping[str, tuple[str, ...]] = {
    "transformer": (TRANSFORMER,),
    "text_head": (PROJECTION, CONNECTORS),
    "video_encoder": (VIDEO_VAE,),
    "video_decoder": (VIDEO_VAE,),
    "audio_encoder": (AUDIO_VAE,),
    "audio_decoder": (AUDIO_VAE,),
    "vocoder": (VOCODER,),
}

# part -> the files of a ModelSpec that may hold it, by field; the first that does is the one that counts
SOURCES: Mapping[str, tuple[str, ...]] = {
    TRANSFORMER: ("checkpoint",),
    CONNECTORS: ("text_projection", "checkpoint"),
    PROJECTION: ("text_projection", "checkpoint", "text_encoder"),
    VIDEO_VAE: ("video_vae", "checkpoint"),
    AUDIO_VAE: ("audio_vae", "checkpoint"),
    VOCODER: ("audio_vae", "checkpoint"),
}


@dataclass(frozen=True, eq=False)
class ModelFiles:
    """Checked headers and configurations of a model's files; no weights. ``preflight`` makes one.

    checkpoint: the file with the transformer. networks: network -> the files that hold it together.
    """

    spec: ModelSpec
    checkpoint: Checkpoint
    networks: Mapping[str, tuple[Checkpoint, ...]]
    version: ModelVersion
    config: ModelConfig
    text_encoder: TextEncoderFiles

    def of(self, network: str) -> tuple[Checkpoint, ...]:
        """The files that hold a network together, without tensors that another file has in their place."""
        return self.networks[network]


def holders(chosen: Mapping[str, Sequence[Checkpoint]]) -> dict[str, Checkpoint]:
    """Part of a model -> the file that holds it; a part that no file has is left out.

    chosen: files by the field of the ModelSpec that names them.
    """
    found = {}
    for part, fields in SOURCES.items():
        files = [file for field in fields for file in chosen.get(field, ())]
        holder = next((file for file in files if any(part_of(name) == part for name in file.tensors)), None)
        if holder is not None:
            found[part] = holder
    return found


def network_files(holders: Mapping[str, Checkpoint]) -> dict[str, tuple[Checkpoint, ...]]:
    """Network -> the files that hold it together, for every network all of whose parts are there."""
    return {
        network: tuple(_without_replaced(file, parts, holders) for file in dict.fromkeys(holders[p] for p in parts))
        for network, parts in NETWORK_PARTS.items()
        if all(part in holders for part in parts)
    }


def _without_replaced(file: Checkpoint, parts: Sequence[str], holders: Mapping[str, Checkpoint]) -> Checkpoint:
    """The file as if it lacked those of the parts that another file holds."""
    replaced = {part for part in parts if holders[part] is not file}
    kept = {name: info for name, info in file.tensors.items() if part_of(name) not in replaced}
    return file if len(kept) == len(file.tensors) else replace(file, tensors=MappingProxyType(kept))
