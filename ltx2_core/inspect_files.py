"""What model files are and what goes with them, for people and programs: ``ltx2 inspect``. Reads headers only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .config.version import ModelVersion
from .file_kinds import (
    DURATION_HEAD,
    LORA,
    MODEL_PARTS,
    PROJECTION,
    TEXT_ENCODER,
    TRANSFORMER,
    UNKNOWN,
    UPSAMPLER,
    VIDEO_VAE,
    Release,
    has_diffusion_decoder,
    kind_of,
    part_of,
    release_of,
)
from .fits import latent_space, misfit, what_fits
from .loading.checkpoint import Checkpoint, read_header
from .loading.keymap import module_names
from .loading.lora.file import LoraFile, read_lora
from .loading.lora.origin import made_for
from .loading.lora.report import match
from .loading.lora.strength import Strength
from .loading.weights import Weight, weights_of
from .text.encoder_config import GEMMA3, family
from .text.encoder_files import TextEncoderFiles, read_text_encoder
from .text.pairing import check_pairing
from .upsampler_files import check_fits, read_upsampler

_UNITS = {"bytes": (" B", " kB", " MB", " GB", " TB"), "parameters": ("", " k", " M", " B", " T")}


@dataclass(frozen=True)
class Amount:
    """Some weights of a file. name: of what they have in common. bytes: of all their tensors, scales included."""

    name: str
    weights: int
    parameters: int
    bytes: int

    def __str__(self) -> str:
        parameters, size = shown(self.parameters, "parameters"), shown(self.bytes, "bytes")
        plural = "s" if self.weights != 1 else ""
        return f"{self.name}: {self.weights} weight{plural}, {parameters} parameters, {size}"


@dataclass
class FileFacts:
    """What one file is.

    kind: as ``file_kinds.kind_of`` says. release: of LTX-2. parts: of a model, and formats: of storage, that it holds.
    details: what only this kind of file has. fits: what goes with it. goes_with, conflicts: of the other files that were
    asked about, those that go with it, and why others do not. error: why it cannot be read or used.
    """

    path: str
    kind: str = UNKNOWN
    release: str | None = None
    size_bytes: int = 0
    parameters: int = 0
    parts: list[Amount] = field(default_factory=list)
    formats: list[Amount] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    fits: str = ""
    goes_with: list[str] = field(default_factory=list)
    conflicts: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.path}: {self.error}"
        release = f" of {self.release}" if self.release else ""
        rows = [
            *(("holds", str(part)) for part in self.parts),
            *(("stored", str(format)) for format in self.formats),
            *((name, _text(value)) for name, value in self.details.items()),
            ("fits", self.fits),
            ("goes with", ", ".join(self.goes_with)),
            *(("conflicts", f"{path}: {why}") for path, why in self.conflicts.items()),
        ]
        head = f"{self.path}: {self.kind}{release}, {shown(self.size_bytes, 'bytes')}"
        return "\n".join([head, *(f"  {name:<11}{text}" for name, text in rows if text)])


def inspect_files(paths: Sequence[Path]) -> list[FileFacts]:
    """The facts of each file or text encoder folder, and which of them go together. Never raises for a bad file."""
    seen = [_look(path) for path in paths]
    for model in seen:
        for other in seen:
            if model is not other and model.version is not None and other.version is None and not other.facts.error:
                _compare(model, other)
    return [one.facts for one in seen]


@dataclass
class _Seen:
    """A file with what could be read of it. version: of the transformer that it holds, None when it holds none."""

    facts: FileFacts
    file: Checkpoint | None = None
    version: ModelVersion | None = None
    lora: LoraFile | None = None
    encoder: TextEncoderFiles | None = None

    @property
    def parts(self) -> set[str]:
        return {part.name for part in self.facts.parts}


def _look(path: Path) -> _Seen:
    seen = _Seen(FileFacts(str(path)))
    try:
        if path.is_dir():
            _look_at_encoder(seen, path)
        else:
            seen.file = read_header(path)
            _look_at_file(seen, seen.file)
    except (ValueError, OSError) as error:  # every refusal of the pack is a ValueError
        seen.facts.error = _one_line(str(error), path)
    return seen


def _look_at_file(seen: _Seen, file: Checkpoint) -> None:
    facts = seen.facts
    facts.kind, facts.size_bytes = kind_of(file), file.size_bytes
    weights = weights_of(file).values()
    release = release_of(file)
    facts.release = None if release is None or facts.kind == TEXT_ENCODER else str(release)
    _count(facts, weights, by_part=facts.kind != LORA)
    if TRANSFORMER in seen.parts and facts.kind != LORA:
        seen.version = file.version()
        facts.fits = _fits_model(seen)
    elif facts.kind == LORA:
        _look_at_lora(seen, file.path)
    elif facts.kind == TEXT_ENCODER:
        _look_at_encoder(seen, file.path)
    elif facts.kind == UPSAMPLER:
        _, config = read_upsampler(file.path)
        facts.details = {"upsampler": str(config), "channels": config.latent_channels}
        facts.fits = f"latents of {_latents_of(release)}"
    elif facts.kind == UNKNOWN:
        facts.details = {"looks like": file.looks_like()}
    elif facts.kind == DURATION_HEAD:
        facts.fits = "LTX-2.5; it is not used yet"
    elif has_diffusion_decoder(file):
        facts.details = {"decoder": "diffusion, which cannot be run yet"}
        facts.fits = "nothing yet: choose " + what_fits(VIDEO_VAE, ModelVersion((2, 5)))
    else:
        shared = VIDEO_VAE in seen.parts
        facts.fits = f"a transformer of {_latents_of(release) if shared else release or 'its own release'}"


def _look_at_lora(seen: _Seen, path: Path) -> None:
    lora = seen.lora = read_lora(path)
    layers = lora.layers.values()
    modules = Counter(_module(layer.owner) for layer in layers)
    seen.facts.details = {
        "kinds": list(lora.titles),
        "ranks": list(lora.ranks),
        "alpha/rank": sorted({layer.scale for layer in layers}),
        "streams": dict(Counter(module.partition(".")[0] for module in modules.elements())),
        "layers": dict(modules),
        "reference": {
            "downscale factor": lora.reference_downscale_factor,
            "temporal scale factor": lora.reference_temporal_scale_factor,
        },
        "hdr": dict(lora.hdr),
        "skipped": dict(Counter(lora.skipped.values())),
    }
    shapes = {owner: layer.shape or () for owner, layer in lora.layers.items()}
    made = made_for(shapes, ModelVersion.from_metadata(lora.checkpoint.metadata))
    seen.facts.fits = f"a transformer of {' or '.join(made) or 'LTX-2; its layers do not tell the release'}"


def _look_at_encoder(seen: _Seen, path: Path) -> None:
    facts, encoder = seen.facts, read_text_encoder(path)
    seen.encoder = encoder
    if path.is_dir():
        facts.kind, facts.size_bytes = TEXT_ENCODER, sum(file.size_bytes for file in encoder.weights)
        _count(facts, [weight for file in encoder.weights for weight in weights_of(file).values()], by_part=True)
    facts.details = {
        "form": encoder.kind,
        "encoder": encoder.version,
        "layers": encoder.num_hidden_states - 1,
        "width": encoder.width,
    }
    facts.fits = "LTX-2.0 and 2.3" if family(encoder.config) == GEMMA3 else "LTX-2.5"


def _count(facts: FileFacts, weights: Iterable[Weight], *, by_part: bool) -> None:
    weights = list(weights)
    facts.parameters = sum(math.prod(weight.shape) for weight in weights)
    facts.formats = _amounts(weights, _format)
    if by_part:
        facts.parts = _amounts(weights, lambda weight: part_of(weight.name) or "other tensors")


def _amounts(weights: Iterable[Weight], name_of: Callable[[Weight], str]) -> list[Amount]:
    groups: dict[str, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(name_of(weight), []).append(weight)
    return [
        Amount(name, len(group), sum(math.prod(w.shape) for w in group), sum(w.size_bytes for w in group))
        for name, group in groups.items()
    ]


def _format(weight: Weight) -> str:
    return weight.parts["data"].dtype if weight.format == "plain" else weight.format


def _module(owner: str) -> str:
    """Stream and kind of a layer of our transformer: "video.attn1"."""
    parts = owner.split(".")
    return ".".join(parts[2:4] if parts[0] == "blocks" else parts[:2])


# what goes together --------------------------------------------------------------------------------------------------


def _fits_model(seen: _Seen) -> str:
    assert seen.version is not None
    missing = [part for part in MODEL_PARTS if part not in seen.parts]
    needed = dict.fromkeys(what_fits(part, seen.version) for part in missing)
    encoder = "the text encoder of LTX-2.5" if seen.version.at_least(2, 4) else "a Gemma 3 12B text encoder"
    upsampler = f"upsamplers and LoRAs of {_latents_of(Release(seen.version, certain=True))}"
    return "; ".join(
        [*needed, *([] if PROJECTION in missing and seen.version.at_least(2, 4) else [encoder]), upsampler]
    )


def _latents_of(release: Release | None) -> str:
    if release is None:
        return "its own release, which the file does not state"
    return "LTX-2.3 or 2.5" if latent_space(release.version) == latent_space(ModelVersion((2, 3))) else str(release)


def _compare(model: _Seen, other: _Seen) -> None:
    """Note whether a file goes with a transformer, with both."""
    try:
        problem = _misfit(model, other)
    except (ValueError, OSError) as error:
        problem = _one_line(str(error), Path(other.facts.path))
    for one, counterpart in ((model, other), (other, model)):
        if problem is None:
            one.facts.goes_with.append(counterpart.facts.path)
        else:
            one.facts.conflicts[counterpart.facts.path] = problem


def _misfit(model: _Seen, other: _Seen) -> str | None:
    """Why a file does not go with a transformer; raises where the check itself does."""
    assert model.file is not None
    assert model.version is not None
    shapes = model.file.shapes
    transformer = {ours: shapes[name] for name, ours in module_names("transformer", shapes).items()}
    if other.lora is not None:
        match(transformer, [(other.lora, Strength.both(1.0))])
    elif other.encoder is not None:
        check_pairing(model.file, model.version, other.encoder)
    elif other.file is not None and other.facts.kind == UPSAMPLER:
        file, config = read_upsampler(other.file.path)
        channels = transformer["video.patchify_proj.weight"][1]
        check_fits(config, channels, model.version.label, file.path.name, ModelVersion.from_metadata(file.metadata))
    elif other.file is not None:
        found = (misfit(part, release_of(other.file), model.version) for part in MODEL_PARTS if part in other.parts)
        return next((problem for problem in found if problem is not None), None)
    return None


# text ----------------------------------------------------------------------------------------------------------------


def shown(number: float, what: str) -> str:
    """A count of bytes or parameters in three digits: "26.9 MB", "19.0 B"."""
    *units, largest = _UNITS[what]
    for unit in units:
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}{largest}"


def _text(value: Any) -> str:
    """A detail as text; empty for one that says nothing."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _one_line(message: str, path: Path) -> str:
    return " ".join(message.removeprefix(f"{path}: ").removeprefix(f"{path.name}: ").split())
