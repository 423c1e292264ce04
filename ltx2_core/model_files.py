"""The files of one model: which they are, what their headers say, and whether they belong together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from .config.fields import ConfigError
from .config.model import ModelConfig
from .config.version import ModelVersion
from .loading import keymap
from .loading.build import check
from .loading.checkpoint import Checkpoint, CheckpointError, read_header
from .model_spec import ModelSpec
from .networks import NETWORKS, build_on_meta
from .text import gemma

_PARTS = {
    "transformer": "transformer",
    "video_decoder": "video VAE",
    "audio_decoder": "audio VAE",
    "vocoder": "vocoder",
    "text_head": "text projection and connectors",
}


@dataclass(frozen=True, eq=False)
class ModelFiles:
    """Checked headers and configurations of a model's files; no weights.

    checkpoint: the LTX-2 file. text_weights: the text encoder's files; text_config: its config.json.
    """

    spec: ModelSpec
    checkpoint: Checkpoint
    version: ModelVersion
    config: ModelConfig
    text_weights: tuple[Checkpoint, ...]
    text_config: dict

    @classmethod
    def read(cls, spec: ModelSpec) -> ModelFiles:
        """Read all headers and check every tensor's name and shape against the networks, before anything is loaded.

        Raises CheckpointError, ConfigError or GemmaError; each names the file and what would fit.
        """
        checkpoint = read_header(spec.checkpoint)
        version = checkpoint.version()
        _check_parts(checkpoint, version)
        text_config = gemma.read_gemma_config(spec.text_encoder)
        text_weights = tuple(read_header(path) for path in gemma.weight_files(spec.text_encoder))
        states = gemma.num_hidden_states(text_config)
        try:
            config = ModelConfig.from_config(checkpoint.config(), states, checkpoint.tensors)
        except ConfigError as error:
            raise ConfigError(f"{checkpoint.path}: {error}") from error
        files = cls(spec, checkpoint, version, config, text_weights, text_config)
        files._check_text_encoder()
        for name in NETWORKS:
            check(build_on_meta(name, config), checkpoint, name)
        return files

    @cached_property
    def text_elements(self) -> int:
        """Weights of the text encoder that are loaded."""
        return sum(
            math.prod(info.shape)
            for file in self.text_weights
            for name, info in file.tensors.items()
            if gemma.module_name(name) is not None
        )

    def elements(self, network: str) -> int:
        """Weights of one network."""
        names = keymap.module_names(network, self.checkpoint.tensors)
        return sum(math.prod(self.checkpoint.tensors[name].shape) for name in names)

    def _check_text_encoder(self) -> None:
        text = self.text_config.get("text_config", self.text_config)
        width, needed = text["hidden_size"], self.config.text.feature_dim
        projections = [
            info.shape[1]
            for name, info in self.checkpoint.tensors.items()
            if name.startswith("text_embedding_projection.") and len(info.shape) == 2
        ]
        states = self.config.num_hidden_states
        if width != needed or any(inputs != width * states for inputs in projections):
            raise ConfigError(
                f"{self.spec.text_encoder}: this text encoder has {states - 1} layers of width {width}, but "
                f"{self.checkpoint.path.name} was made for {projections[0] // needed - 1} layers of width {needed}. "
                "LTX-2.0 and 2.3 need Gemma 3 12B (google/gemma-3-12b-it-qat-q4_0-unquantized)."
            )


def _check_parts(checkpoint: Checkpoint, version: ModelVersion) -> None:
    """Say in one sentence when whole networks are missing, rather than list their tensors."""
    missing = [label for name, label in _PARTS.items() if not keymap.module_names(name, checkpoint.tensors)]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: this is {checkpoint.looks_like()} and has no {', no '.join(missing)}. Loaded as one "
            "model it must hold everything: choose the full checkpoint of LTX-2.0 or 2.3 "
            "(ltx-2-19b-*.safetensors, ltx-2.3-22b-*.safetensors)."
        )
