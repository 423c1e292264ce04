"""LoRA files: which weights of the transformer they change, and adding their differences to those weights.

A LoRA holds, for a linear layer with weight W [out, in], two factors A [rank, in] and B [out, rank]; the layer becomes
W + strength * alpha/rank * B A (Hu et al., "LoRA", arXiv 2106.09685). alpha/rank counts as 1 in files without alpha,
as the LTX trainer writes them.

Numerics: all differences of a weight are summed in float32 in the order of the list, the sum is added to the weight
in float32 and the result is rounded once. ltx-core computes the factors' product and the sum in bfloat16 and ignores
alpha: about one weight in eight differs by one bfloat16 unit, more where a file has an alpha other than its rank.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    quantised_error,
    read_header,
    read_tensors,
)
from .keymap import transformer_module_name

log = logging.getLogger("ltx2.loading")

MAX_STRENGTH = 10.0

_MAX_FACTOR = 64
_SHOWN = 6

_A, _B, _ALPHA = "A", "B", "alpha"
# how the names of a layer's tensors end -> which of the three it is
_PARTS = {
    ".alpha": _ALPHA,
    **{
        f".{name}{end}": part
        for part, names in ((_A, ("lora_A", "lora_down", "lora.down")), (_B, ("lora_B", "lora_up", "lora.up")))
        for name in names
        for end in ("", ".weight", ".default.weight")
    },
}

# a part of a tensor's name that tells another algebra: by its beginning, and whole
_OTHER_BEGINNINGS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon with a middle factor",
}
_OTHER_WHOLE = dict.fromkeys(
    ("diff", "diff_b", "set_weight", "w_norm", "b_norm", "reshape_weight"), "full differences (not factored)"
)
_BIAS = re.compile(r"\.(lora_B|lora_up|lora\.up)(\.default)?\.bias$")

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
_FLAT_PREFIXES = ("lora_unet_", "lycoris_")
_FLAT_BLOCK = re.compile(r"transformer_blocks_([0-9]+)_(.+)")
# every linear layer of the transformer of any release, in the checkpoint's names: beginnings and ends
_BLOCK = "transformer_blocks.0."
_ADALN = ("adaln_single", "prompt_adaln_single")
_CROSS_ADALN = ("video_scale_shift", "audio_scale_shift", "a2v_gate", "v2a_gate")
_LAYERS = (
    (
        [_BLOCK + name for name in ("attn1", "attn2", "audio_attn1", "audio_attn2")]
        + [_BLOCK + name for name in ("audio_to_video_attn", "video_to_audio_attn")],
        (".to_q", ".to_k", ".to_v", ".to_out.0", ".to_gate_logits"),
    ),
    ([_BLOCK + "ff", _BLOCK + "audio_ff"], (".net.0.proj", ".net.2")),
    (["patchify_proj", "audio_patchify_proj", "proj_out", "audio_proj_out"], ("",)),
    (["caption_projection", "audio_caption_projection"], (".linear_1", ".linear_2")),
    (
        [*_ADALN, *(f"audio_{name}" for name in _ADALN), *(f"av_ca_{name}_adaln_single" for name in _CROSS_ADALN)],
        (".emb.timestep_embedder.linear_1", ".emb.timestep_embedder.linear_2", ".linear"),
    ),
)

# diffusers 0.42's names of the layers that it renames; each stands first in a name, so parts of other names
# ("audio_time_embed", "prompt_adaln") are never touched
_DIFFUSERS = {
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

_FITS = (
    "What fits: a LoRA trained for an LTX-2 transformer of this model's version, with tensors such as "
    "diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight"
)


class LoraError(CheckpointError):
    """A LoRA cannot be used; the message names the file, what was found and what would fit."""


@dataclass(frozen=True)
class LoraPair:
    """The factors of one linear layer, as they lie in the file.

    name: the layer's name in the file. a: [rank, in]. b: [out, rank]. alpha: one number, or None when absent.
    """

    name: str
    a: TensorInfo
    b: TensorInfo
    alpha: TensorInfo | None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that the pair is for: (out, in)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.a, self.b) if self.alpha is None else (self.a, self.b, self.alpha)


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What the checked header of a LoRA file says; no tensor data.

    pairs: name of a linear layer in our transformer ("blocks.3.video.attn1.to_q") -> its factors.
    skipped: layer or tensor in the file -> why it is not used.
    reference_downscale_factor, reference_temporal_scale_factor: how much smaller than the output, and how many times
    fewer frames, the reference video of an IC-LoRA is.
    """

    checkpoint: Checkpoint = field(repr=False)
    pairs: Mapping[str, LoraPair] = field(repr=False)
    skipped: Mapping[str, str] = field(repr=False)
    reference_downscale_factor: int = 1
    reference_temporal_scale_factor: int = 1

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks of the pairs, ascending."""
        return tuple(sorted({pair.rank for pair in self.pairs.values()}))


@dataclass(frozen=True)
class LoraMatch:
    """What one LoRA does to a model.

    matched: layers of the model that it changes. skipped: layer or tensor in the file -> why it changes nothing.
    """

    file: LoraFile
    strength: float
    matched: tuple[str, ...] = field(repr=False)
    skipped: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class FuseReport:
    """What a list of LoRAs does to a model, in the order of the list."""

    files: tuple[LoraMatch, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer whose weight changes, once; strength 0 changes nothing."""
        return tuple(dict.fromkeys(name for one in self.files if one.strength for name in one.matched))

    @property
    def size_bytes(self) -> int:
        """How many bytes ``fuse`` reads: the total of its progress."""
        return sum(
            info.size_bytes
            for one in self.files
            if one.strength
            for name in one.matched
            for info in one.file.pairs[name].tensors
        )


def read_lora(path: Path) -> LoraFile:
    """Read what a LoRA file is for from its header.

    Raises CheckpointError for an unsound file, and LoraError for one of another algebra (DoRA, LoHa, ...), with half a
    pair, or without any pair for an LTX-2 transformer.
    """
    checkpoint = read_header(path)
    _refuse_other_kinds(checkpoint)
    layers, skipped = _by_layer(checkpoint)
    pairs: dict[str, LoraPair] = {}
    for name, parts in layers.items():
        ours = _module_name(name)
        if ours is None:
            skipped[name] = "not a part of the LTX-2 transformer"
        elif ours in pairs:
            raise _error(checkpoint, f"{pairs[ours].name!r} and {_shown(name)} are the same layer", "use another file")
        else:
            pairs[ours] = _pair(checkpoint, name, parts)
    if not pairs:
        raise LoraError(
            f"{checkpoint.path}: no LoRA of an LTX-2 transformer: it looks like {checkpoint.looks_like()}, "
            f"with names that begin with {_beginnings(checkpoint)}. {_FITS}."
        )
    return LoraFile(
        checkpoint=checkpoint,
        pairs=MappingProxyType(pairs),
        skipped=MappingProxyType(skipped),
        reference_downscale_factor=_factor(checkpoint, "reference_downscale_factor"),
        reference_temporal_scale_factor=_factor(checkpoint, "reference_temporal_scale_factor"),
    )


def reference_factors(loras: Sequence[LoraFile]) -> tuple[int, int]:
    """The reference video's downscale and temporal factor that several LoRAs agree on; 1 where none sets any.

    Raises LoraError when two files need different ones.
    """
    return _agreed(loras, "reference_downscale_factor"), _agreed(loras, "reference_temporal_scale_factor")


def match(module: nn.Module, loras: Sequence[tuple[LoraFile, float]]) -> FuseReport:
    """What fusing (file, strength) pairs would change, from headers alone; the module may lie on the meta device.

    Raises ValueError for a strength that is not a number from -10 to 10, and LoraError for factors of another shape
    than the module's weight and for a file that fits no layer of it.
    """
    weights = dict(module.named_parameters())
    return FuseReport(tuple(_match(weights, file, check_strength(file.path, strength)) for file, strength in loras))


def fuse(
    module: nn.Module,
    loras: Sequence[tuple[LoraFile, float]],
    *,
    device: torch.device | str,
    on_bytes: Callable[[int], None] | None = None,
) -> FuseReport:
    """Add LoRAs to the weights of a transformer, in place, one weight after another.

    loras: (file, strength) pairs. device: where the differences are computed; the weights stay where they are.
    on_bytes: as in ``read_tensors``; the total is ``match(module, loras).size_bytes``. Beyond the module it takes the
    memory of one weight in float32, three times. Raises as ``match`` does, before anything is changed; an error while
    reading leaves the module changed in part, to be dropped.
    """
    report = match(module, loras)
    weights = dict(module.named_parameters())
    scales: list[Counter[float]] = [Counter() for _ in report.files]
    with torch.no_grad():
        for name in report.layers:
            weight = weights[name + ".weight"]
            delta = torch.zeros(weight.shape, dtype=torch.float32, device=device)
            for one, counts in zip(report.files, scales, strict=True):
                pair = one.file.pairs.get(name)
                if pair is not None and one.strength:
                    a, b, scale = _read(one.file.checkpoint, pair, device, on_bytes)
                    delta.addmm_(b, a, alpha=one.strength * scale)
                    counts[scale] += 1
            weight.copy_(delta.add_(weight.to(device=device, dtype=torch.float32)))
    for one, counts in zip(report.files, scales, strict=True):
        _log(one, counts)
    return report


def check_strength(path: Path, strength: float) -> float:
    """The strength of a LoRA. Raises ValueError unless it is a number from -10 to 10."""
    if not (math.isfinite(strength) and abs(strength) <= MAX_STRENGTH):
        raise ValueError(
            f"{path}: a LoRA's strength must be a number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}, found {strength}. "
            "1 is what the file was trained for."
        )
    return float(strength)


# names ---------------------------------------------------------------------------------------------------------------


def _by_layer(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, str]]:
    """The file's layers, each with its parts, and tensors that are no part of a LoRA with the reason."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    skipped: dict[str, str] = {}
    for info in checkpoint.tensors.values():
        suffix = next((suffix for suffix in _PARTS if info.name.endswith(suffix)), None)
        if suffix is None:
            skipped[info.name] = "neither a factor nor the alpha of a LoRA"
            continue
        name, part = info.name.removesuffix(suffix), _PARTS[suffix]
        parts = layers.setdefault(name, {})
        if part in parts:
            raise _error(
                checkpoint,
                f"{_shown(parts[part].name)} and {_shown(info.name)} are the same factor",
                "use another file",
            )
        parts[part] = info
    return layers, skipped


def _module_name(name: str) -> str | None:
    """Our name of a layer of the transformer, given its name in a LoRA file; None for anything else."""
    name = name.removeprefix("base_model.model.")
    flat = next((prefix for prefix in _FLAT_PREFIXES if name.startswith(prefix)), None)
    if flat is not None:
        found = _unflatten(name.removeprefix(flat))
        return None if found is None else transformer_module_name(found)
    name = name.removeprefix(next((prefix for prefix in _PREFIXES if name.startswith(prefix)), ""))
    first, dot, rest = name.partition(".")
    return transformer_module_name(_DIFFUSERS.get(first, first) + dot + rest)


def _unflatten(name: str) -> str | None:
    """A layer's checkpoint name from the one with underscores for dots: looked up, since names have their own."""
    block = _FLAT_BLOCK.fullmatch(name)
    if block is None:
        return _flat_names().get(name)
    found = _flat_names().get(f"transformer_blocks_0_{block[2]}")
    return None if found is None else found.replace(".0.", f".{block[1]}.", 1)


@cache
def _flat_names() -> Mapping[str, str]:
    """Name with underscores for dots -> name, of every linear layer of block 0 and outside of the blocks."""
    names = [f"{name}{end}" for names, ends in _LAYERS for name in names for end in ends]
    return {name.replace(".", "_"): name for name in names}


# what a header must promise ------------------------------------------------------------------------------------------


def _refuse_other_kinds(checkpoint: Checkpoint) -> None:
    for name in checkpoint.tensors:
        kind = _other_kind(name)
        if kind is not None:
            raise _error(
                checkpoint,
                f"tensor {_shown(name)} makes this a file of another kind: {kind}",
                "this is for a later version; plain LoRA (factors A and B, with or without alpha) can be used",
            )


def _other_kind(name: str) -> str | None:
    if _BIAS.search(name):
        return "LoRA with a bias"
    for part in name.split("."):
        kind = _OTHER_WHOLE.get(part)
        if kind is not None:
            return kind
        for beginning, kind in _OTHER_BEGINNINGS.items():
            if part.startswith(beginning):
                return kind
    return None


def _pair(checkpoint: Checkpoint, name: str, parts: Mapping[str, TensorInfo]) -> LoraPair:
    a, b, alpha = (parts.get(part) for part in (_A, _B, _ALPHA))
    if a is None or b is None:
        there = " and ".join(_shown(info.name) for info in parts.values())
        missing = " and ".join(part for part, info in ((_A, a), (_B, b)) if info is None)
        raise _error(
            checkpoint, f"half a pair: {there} without factor {missing}", "the file is incomplete: get it again"
        )
    for info in (a, b):
        if info.dtype not in FLOAT_DTYPES:
            raise quantised_error(checkpoint, info)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise _error(
            checkpoint,
            f"the factors of {_shown(name)} have shapes A {list(a.shape)} and B {list(b.shape)}",
            "they must be A [rank, in] and B [out, rank] of a linear layer",
        )
    if alpha is not None and math.prod(alpha.shape) != 1:
        raise _error(checkpoint, f"{_shown(alpha.name)} has shape {list(alpha.shape)}", "an alpha must be one number")
    return LoraPair(name, a, b, alpha)


def _factor(checkpoint: Checkpoint, key: str) -> int:
    text = checkpoint.metadata.get(key, "1").strip().strip('"')
    number = re.fullmatch(r"([0-9]{1,9})(?:\.0+)?", text)
    if number is None or not 1 <= int(number[1]) <= _MAX_FACTOR:
        raise _error(
            checkpoint,
            f"its metadata says {key} = {_shown(text)}",
            f"it must be a whole number from 1 to {_MAX_FACTOR}",
        )
    return int(number[1])


def _agreed(loras: Sequence[LoraFile], key: str) -> int:
    by_value = {getattr(lora, key): lora.path.name for lora in loras if getattr(lora, key) != 1}
    if len(by_value) > 1:
        found = ", ".join(f"{name} needs {value}" for value, name in by_value.items())
        raise LoraError(f"these LoRAs need references of different {key}: {found}. Use one of them at a time.")
    return next(iter(by_value), 1)


# fitting a model -----------------------------------------------------------------------------------------------------


def _match(weights: Mapping[str, Tensor], file: LoraFile, strength: float) -> LoraMatch:
    matched, wrong, skipped = [], [], dict(file.skipped)
    for name, pair in file.pairs.items():
        weight = weights.get(name + ".weight")
        if weight is None:
            skipped[pair.name] = "this model has no such layer"
        elif tuple(weight.shape) != pair.shape:
            wrong.append(f"{_shown(pair.name)} changes a weight {list(pair.shape)}, here it is {list(weight.shape)}")
        else:
            assert weight.is_floating_point(), f"{name} is {weight.dtype}"
            matched.append(name)
    if wrong:
        raise LoraError(f"{file.path}: a LoRA for a model of other sizes: {_first(wrong, '; ')}. {_FITS}.")
    if not matched:
        raise LoraError(
            f"{file.path}: none of its {len(file.pairs)} layers is in this model: it changes "
            f"{_first([_shown(pair.name) for pair in file.pairs.values()])}. {_FITS}."
        )
    return LoraMatch(file, strength, tuple(matched), MappingProxyType(skipped))


def _read(
    checkpoint: Checkpoint, pair: LoraPair, device: torch.device | str, on_bytes: Callable[[int], None] | None
) -> tuple[Tensor, Tensor, float]:
    """Factors A and B in float32, and alpha/rank."""
    names = [info.name for info in pair.tensors]
    tensors = dict(read_tensors(checkpoint, names, device=device, dtype=torch.float32, on_bytes=on_bytes))
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise _error(checkpoint, f"tensor {_shown(name)} has values that are no numbers", "get the file again")
    a, b = tensors[pair.a.name], tensors[pair.b.name]
    return a, b, 1.0 if pair.alpha is None else tensors[pair.alpha.name].item() / pair.rank


def _log(one: LoraMatch, scales: Mapping[float, int]) -> None:
    name = one.file.path.name
    ranks = ", ".join(map(str, one.file.ranks))
    log.info("%s (rank %s) at strength %g: %d layers changed", name, ranks, one.strength, len(one.matched))
    for scale, count in scales.items():
        if scale != 1:
            log.info("%s: alpha/rank is %g, not 1, in %d layers", name, scale, count)
    for reason, count in Counter(one.skipped.values()).items():
        names = [_shown(skipped) for skipped, why in one.skipped.items() if why == reason]
        log.warning("%s: %d skipped, %s: %s", name, count, reason, _first(names))


# messages ------------------------------------------------------------------------------------------------------------


def _beginnings(checkpoint: Checkpoint) -> str:
    counts = Counter(".".join(name.split(".")[:2]) for name in checkpoint.tensors)
    return _first([_shown(beginning) for beginning, _ in counts.most_common()])


def _first(names: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more


def _shown(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:120] + "...")


def _error(checkpoint: Checkpoint, problem: str, remedy: str) -> LoraError:
    return LoraError(f"{checkpoint.path}: {problem}: {remedy}")
