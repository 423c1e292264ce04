"""Adding LoRAs to the weights of a module, in place, without a way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..checkpoint import read_tensors
from .delta import Part, add_deltas
from .file import LoraFile
from .finite import FiniteCheck
from .report import FileReport, Report, match
from .strength import Strength

Loras = Sequence[tuple[LoraFile, Strength | float]]


def match_module(module: nn.Module, loras: Loras) -> Report:
    """``report.match`` for a module, which may lie on the meta device; a number counts for both streams."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return match(shapes, [(file, s if isinstance(s, Strength) else Strength.both(s)) for file, s in loras])


def fuse(
    module: nn.Module,
    loras: Loras,
    *,
    device: torch.device | str,
    on_bytes: Callable[[int], None] | None = None,
) -> Report:
    """Add LoRAs to the parameters of a transformer, in place, one after another.

    device: where the differences are computed; the parameters stay where they are. on_bytes: as in ``read_tensors``; the
    total is the report's ``size_bytes``. Raises as ``match`` does, before anything is changed; an error while reading
    leaves the module changed in part, to be dropped.
    """
    report = match_module(module, loras)
    parameters = dict(module.named_parameters())
    check = FiniteCheck()
    with torch.no_grad():
        for name in report.parameters:
            parts = [part for one in report.files for part in _parts(one, name, device, on_bytes, check)]
            weight = parameters[name]
            weight.copy_(add_deltas(weight.to(device), parts, dtype=weight.dtype))
    check.finish()
    report.log()
    return report


def _parts(
    one: FileReport, name: str, device: torch.device | str, on_bytes: Callable[[int], None] | None, check: FiniteCheck
) -> list[Part]:
    """What a file changes in a parameter, with its tensors read: nothing or one part."""
    layer, strength = one.parameters.get(name), one.strength.of(name)
    if layer is None or not strength:
        return []
    file, infos = one.file.checkpoint, layer.parameters[name]
    roles = {info.name: role for role, info in infos.items()}
    read = read_tensors(file, roles, device=device, on_bytes=on_bytes)
    tensors: dict[str, Tensor] = {roles[key]: tensor for key, tensor in read}
    check.note(file, [(infos[role], tensor) for role, tensor in tensors.items()])
    return [(layer, tensors, strength)]
