"""Whether the files of a model belong together, from their headers alone and all at once.

Nothing is loaded before the whole set has passed: a wrong file is refused at once, and together with every other one that
is wrong, each with what would fit in its place.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from .config.audio import AudioVAEConfig, VocoderConfig
from .config.fields import ConfigError
from .config.model import ModelConfig
from .config.text import TextConfig
from .config.transformer import TransformerConfig
from .config.version import ModelVersion
from .config.video_vae import VideoVAEConfig
from .file_kinds import (
    AUDIO_VAE,
    CONNECTORS,
    PROJECTION,
    TRANSFORMER,
    VIDEO_VAE,
    VOCODER,
    describe,
    has_diffusion_decoder,
    part_of,
    release_of,
)
from .fits import WHOLE_MODEL, misfit, what_fits
from .loading.build import check
from .loading.checkpoint import Checkpoint, CheckpointError, read_header
from .loading.keymap import module_names
from .loading.lora.file import read_lora
from .loading.lora.report import match
from .loading.lora.strength import Strength
from .loading.weights import weights_of
from .model_files import NETWORK_PARTS, SOURCES, ModelFiles, holders, network_files
from .model_spec import ModelSpec
from .networks import build_on_meta
from .text.encoder_config import WHAT_FITS
from .text.encoder_files import TextEncoderFiles, read_text_encoder
from .text.pairing import check_pairing
from .upsampler_files import check_fits, read_upsampler

# field of a ModelSpec -> what its file is called, and the parts of which it must hold one
_ROLES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "checkpoint": ("checkpoint", (TRANSFORMER,)),
    "video_vae": ("video VAE", (VIDEO_VAE,)),
    "audio_vae": ("audio VAE", (AUDIO_VAE,)),
    "text_projection": ("text projection", (PROJECTION, CONNECTORS)),
}

# field of a ModelConfig -> the part whose file has its configuration, the section, and how that is read
_READERS: Mapping[str, tuple[str, str, Callable[[Mapping[str, Any], Checkpoint], Any]]] = {
    "transformer": (TRANSFORMER, "transformer", lambda config, file: TransformerConfig.from_config(config)),
    "text": (TRANSFORMER, "transformer", lambda config, file: TextConfig.from_config(config)),
    "video_vae": (VIDEO_VAE, "vae", lambda config, file: _video_vae(config, file)),
    "audio_vae": (AUDIO_VAE, "audio_vae", lambda config, file: AudioVAEConfig.from_config(config)),
    "vocoder": (VOCODER, "vocoder", lambda config, file: VocoderConfig.from_config(config)),
}
# network -> the field of a ModelConfig that it is built from
_CONFIG_OF = {
    "transformer": "transformer",
    "text_head": "text",
    "video_encoder": "video_vae",
    "video_decoder": "video_vae",
    "audio_encoder": "audio_vae",
    "audio_decoder": "audio_vae",
    "vocoder": "vocoder",
}
# stream -> the part that makes its latents, the field of its configuration, and where that says how wide they are
_LATENTS = {"video": (VIDEO_VAE, "video_vae", "latent_channels"), "audio": (AUDIO_VAE, "audio_vae", "token_width")}


class PreflightError(CheckpointError):
    """Files cannot be used as one model; the message names every file, what it is, and what would fit."""


@dataclass
class Entry:
    """One file of a set. role: what it was chosen for. what: what it is. problems: why it cannot be used."""

    role: str
    path: Path
    what: str = ""
    problems: list[str] = field(default_factory=list)

    def refuse(self, problem: str) -> None:
        problem = problem.removeprefix(f"{self.path}: ").removeprefix(f"{self.path.name}: ")
        if problem not in self.problems:
            self.problems.append(problem)

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """What is refused inside the block becomes a problem of this file."""
        try:
            yield
        except (ValueError, OSError) as error:  # every refusal of the pack is a ValueError
            self.refuse(str(error))

    def __str__(self) -> str:
        return f"{self.role} {self.path}" + (f" ({self.what})" if self.what else "")


@dataclass(frozen=True)
class Preflight:
    """What a check of a set of files found. files: the model, None when it cannot be used."""

    entries: tuple[Entry, ...]
    files: ModelFiles | None

    def require(self) -> ModelFiles:
        """The model's files. Raises PreflightError with all problems of all files."""
        if self.files is None or any(entry.problems for entry in self.entries):
            raise PreflightError(str(self))
        return self.files

    def __str__(self) -> str:
        wrong = [entry for entry in self.entries if entry.problems]
        right = [entry for entry in self.entries if not entry.problems]
        if not wrong:
            return "\n".join(["These files fit:", *map(str, right)])
        lines = [f"{len(wrong)} of {len(self.entries)} files cannot be used:"]
        for entry in wrong:
            lines += [str(entry), *(textwrap.indent(problem, "    ") for problem in entry.problems)]
        return "\n".join([*lines, *(["Nothing speaks against:", *map(str, right)] if right else [])])


def preflight(spec: ModelSpec, upsamplers: Sequence[Path] = ()) -> Preflight:
    """Check the files of a model, its LoRAs and upsamplers against each other; no tensor data is read."""
    return _Check(spec).run(upsamplers)


def open_files(spec: ModelSpec) -> ModelFiles:
    """The files of a model. Raises PreflightError unless they all fit."""
    return preflight(spec).require()


class _Check:
    """One run of the check. Each step uses what the steps before it found out, and leaves out what needs the rest."""

    def __init__(self, spec: ModelSpec):
        self.spec = spec
        self.entries: list[Entry] = []
        self.by_field: dict[str, Entry] = {}
        self.headers: dict[str, tuple[Checkpoint, ...]] = {}
        self.held: dict[str, Checkpoint] = {}
        self.text_encoder: TextEncoderFiles | None = None
        self.version: ModelVersion | None = None
        self.config: dict[str, Any] = {}  # fields of a ModelConfig

    def run(self, upsamplers: Sequence[Path]) -> Preflight:
        self._read_headers()
        self._read_text_encoder()
        self.held = holders(self.headers)
        self._check_missing()
        self._read_config()
        self._check_latents()
        self._check_networks()
        self._check_text_encoder()
        self._check_releases()
        self._check_loras()
        self._check_upsamplers(upsamplers)
        fits = not any(entry.problems for entry in self.entries)
        return Preflight(tuple(self.entries), self._files() if fits else None)

    def _enter(self, role: str, path: Path) -> Entry:
        self.entries.append(Entry(role, path))
        return self.entries[-1]

    def _entry_of(self, part: str) -> Entry:
        """The entry of the file that holds a part, else of the checkpoint."""
        holder = self.held.get(part)
        fields = (name for name in SOURCES[part] if holder in self.headers.get(name, ()))
        return self.by_field[next(fields, "checkpoint")]

    def _instead(self, part: str) -> str:
        if part == TRANSFORMER:
            return f": choose {WHOLE_MODEL}"
        return "" if self.version is None else f": choose {what_fits(part, self.version)}"

    # reading ----------------------------------------------------------------------------------------------------------

    def _read_headers(self) -> None:
        for name, (role, parts) in _ROLES.items():
            path = getattr(self.spec, name)
            if path is None:
                continue
            entry = self.by_field[name] = self._enter(role, path)
            with entry.trying():
                file = read_header(path)
                entry.what = describe(file)
                weights_of(file)
                self.headers[name] = (file,)
                if not any(part_of(tensor) in parts for tensor in file.tensors):
                    entry.refuse(f"it holds no {' and no '.join(parts)}{self._instead(parts[0])}")
                elif name == "checkpoint":
                    self.version = file.version()

    def _read_text_encoder(self) -> None:
        path = self.spec.text_encoder
        entry = self.by_field["text_encoder"] = self._enter("text encoder", path)
        with entry.trying():
            found = self.text_encoder = read_text_encoder(path)
            entry.what = f"{found.version}, {found.num_hidden_states - 1} layers of width {found.width}"
            self.headers["text_encoder"] = found.weights

    def _read_config(self) -> None:
        configs: dict[Checkpoint, Mapping[str, Any]] = {}
        for name, (part, key, read) in _READERS.items():
            if part in self.held and (part != TRANSFORMER or self.version is not None):
                file = self.held[part]
                with self._entry_of(part).trying():
                    if part == VIDEO_VAE:
                        _check_decoder(file)
                    if file not in configs:
                        configs[file] = file.config()
                    self.config[name] = read(_section(configs[file], file, key), file)

    # the model's parts ------------------------------------------------------------------------------------------------

    def _check_missing(self) -> None:
        if self.version is None:
            return
        missing: dict[str, list[str]] = {}
        for part, fields in SOURCES.items():
            if part not in self.held:
                chosen = fields[0] in self.by_field and part != CONNECTORS
                missing.setdefault(fields[0] if chosen else "checkpoint", []).append(part)
        for name, parts in missing.items():
            if not self.by_field[name].problems:  # else it could not be read, or is another kind of file
                fitting = "; ".join(dict.fromkeys(_choice(part, self.version) for part in parts))
                self.by_field[name].refuse(f"it has no {', no '.join(parts)}. Choose: {fitting}")

    def _check_latents(self) -> None:
        """As ModelConfig does, but naming the file."""
        for stream, (part, name, channels) in _LATENTS.items():
            if not {"transformer", name} <= self.config.keys():
                continue
            needed = getattr(self.config["transformer"].streams, stream).in_channels
            found = getattr(self.config[name], channels)
            if needed != found:
                self._entry_of(part).refuse(
                    f"its {stream} latents have {found} channels, but the transformer's tokens have {needed}: they belong "
                    f"to different models{self._instead(part)}"
                )

    def _check_networks(self) -> None:
        for network, files in network_files(self.held).items():
            if _CONFIG_OF[network] in self.config:
                states = self._projected_states() if network == "text_head" else 0
                # a network is built from its own field
                config = cast(ModelConfig, SimpleNamespace(**self.config, num_hidden_states=states))
                with self._entry_of(NETWORK_PARTS[network][0]).trying():
                    check(build_on_meta(network, config), files, network)

    def _projected_states(self) -> int:
        """How many hidden states the text projection takes; where it does not say so, how many there are."""
        inputs, width = self._projection_inputs(), self.config["text"].feature_dim
        if inputs and inputs % width == 0:
            return inputs // width
        return 1 if self.text_encoder is None else self.text_encoder.num_hidden_states

    def _projection_inputs(self) -> int | None:
        weights = weights_of(self.held[PROJECTION]).values() if PROJECTION in self.held else ()
        return next((w.shape[1] for w in weights if part_of(w.name) == PROJECTION and len(w.shape) == 2), None)

    # the parts together -----------------------------------------------------------------------------------------------

    def _check_text_encoder(self) -> None:
        found, entry = self.text_encoder, self.by_field["text_encoder"]
        if found is None:
            return
        if self.version is not None:
            with entry.trying():
                check_pairing(self.held[TRANSFORMER], self.version, found)
        inputs = self._projection_inputs()
        if inputs is None or "text" not in self.config:
            return
        states, width, needed = found.num_hidden_states, found.width, self.config["text"].feature_dim
        if width != needed or inputs != width * states:
            entry.refuse(
                f"this text encoder has {states - 1} layers of width {width}, but {self.held[PROJECTION].path.name} was "
                f"made for {inputs // needed - 1} layers of width {needed}. {WHAT_FITS}"
            )

    def _check_releases(self) -> None:
        if self.version is None:
            return
        wrong = {self.held.get(TRANSFORMER)}
        for part, file in self.held.items():
            problem = misfit(part, release_of(file), self.version) if file not in wrong else None
            if problem is not None:
                wrong.add(file)
                self._entry_of(part).refuse(problem)

    def _check_loras(self) -> None:
        for lora in self.spec.loras:
            entry = self._enter("LoRA", lora.path)
            with entry.trying():
                file = read_lora(lora.path)
                ranks = f" of rank {', '.join(map(str, file.ranks))}" if file.ranks else ""
                entry.what = f"{' and '.join(file.titles)}{ranks}"
                if TRANSFORMER in self.held:
                    strength = Strength(lora.strength * lora.video, lora.strength * lora.audio)
                    match(self._transformer_shapes(), [(file, strength)], parity=lora.parity)

    def _transformer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Our name of every parameter of the transformer -> its shape."""
        shapes = self.held[TRANSFORMER].shapes
        return {ours: shapes[name] for name, ours in module_names("transformer", shapes).items()}

    def _check_upsamplers(self, paths: Sequence[Path]) -> None:
        for path in paths:
            entry = self._enter("upsampler", path)
            with entry.trying():
                file, config = read_upsampler(path)
                stated = ModelVersion.from_metadata(file.metadata)
                entry.what = f"{config} upsampler" + (f" of LTX-{stated.label}" if stated is not None else "")
                if self.version is not None and "video_vae" in self.config:
                    channels = self.config["video_vae"].latent_channels
                    check_fits(config, channels, self.version.label, path.name, stated)

    def _files(self) -> ModelFiles:
        assert self.version is not None
        assert self.text_encoder is not None
        return ModelFiles(
            spec=self.spec,
            checkpoint=self.held[TRANSFORMER],
            networks=network_files(self.held),
            version=self.version,
            config=ModelConfig(**self.config, num_hidden_states=self.text_encoder.num_hidden_states),
            text_encoder=self.text_encoder,
        )


def _section(config: Mapping[str, Any], file: Checkpoint, key: str) -> Mapping[str, Any]:
    """One section of a file's configuration; of the released one where the file has lost it, as parts of files do."""
    if key not in config:
        metadata = {name: value for name, value in file.metadata.items() if name != "config"}
        config = replace(file, metadata=metadata).config()
    return {key: config[key]} if key in config else {}


def _choice(part: str, version: ModelVersion) -> str:
    """What to choose for a part that is nowhere, and in which input where one input alone can name it."""
    alone = part in (VIDEO_VAE, AUDIO_VAE, VOCODER) or (part == PROJECTION and not version.at_least(2, 4))
    return what_fits(part, version) + (f", as {SOURCES[part][0]}" if alone else "")


def _check_decoder(file: Checkpoint) -> None:
    if has_diffusion_decoder(file):
        fitting = what_fits(VIDEO_VAE, ModelVersion((2, 5)))
        raise ConfigError(f"it holds the diffusion decoder of LTX-2.5, which cannot be run yet: choose {fitting}")


def _video_vae(config: Mapping[str, Any], file: Checkpoint) -> VideoVAEConfig:
    conditioned = any(name.endswith("decoder.timestep_scale_multiplier") for name in file.tensors)
    return VideoVAEConfig.from_config(config, timestep_conditioning=conditioned)
