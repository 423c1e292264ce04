"""Putting a checkpoint's tensors into a module that was built without memory (on the meta device), strictly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from .checkpoint import FLOAT_DTYPES, Checkpoint, CheckpointError, TensorInfo, quantised_error, read_tensors
from .keymap import checkpoint_name, module_name, module_names

M = TypeVar("M", bound=nn.Module)
Shape = tuple[int, ...]

_SHOWN = 12
_QUANTISED_SUFFIXES = (
    ".weight_scale",
    ".weight_scale_2",
    ".input_scale",
    ".scale_weight",
    ".scale_input",
    ".comfy_quant",
)

# where users find each component
_WOULD_FIT = {
    "transformer": "a full LTX-2 checkpoint (2.0, 2.3) or a transformer file (2.5)",
    "video_encoder": "a full LTX-2 checkpoint (2.0, 2.3) or a video VAE file (2.5)",
    "video_decoder": "a full LTX-2 checkpoint (2.0, 2.3) or a video VAE file (2.5)",
    "audio_encoder": "a full LTX-2 checkpoint (2.0, 2.3) or an audio VAE file (2.5)",
    "audio_decoder": "a full LTX-2 checkpoint (2.0, 2.3) or an audio VAE file (2.5)",
    "vocoder": "a full LTX-2 checkpoint (2.0, 2.3) or an audio VAE file (2.5)",
    "text_head": "a full LTX-2 checkpoint (2.0, 2.3), or a transformer file with the text encoder file of the same "
    "release (2.5)",
    "upsampler": "a latent upsampler file",
}


class MismatchError(CheckpointError):
    """A file's tensors are not those of the module. Names are the checkpoint's; the lists are complete.

    missing, unexpected: name -> shape; wrong_shape: name -> (found, needed); repeated: names given more than once.
    """

    def __init__(
        self,
        source: str,
        component: str,
        looks: str | None,
        *,
        missing: Mapping[str, Shape],
        unexpected: Mapping[str, Shape],
        wrong_shape: Mapping[str, tuple[Shape, Shape]],
        repeated: Sequence[str],
    ):
        self.missing = dict(missing)
        self.unexpected = dict(unexpected)
        self.wrong_shape = dict(wrong_shape)
        self.repeated = tuple(repeated)
        lists = (
            ("missing", [f"{name} {list(shape)}" for name, shape in missing.items()]),
            ("unexpected", [f"{name} {list(shape)}" for name, shape in unexpected.items()]),
            ("of another shape", [f"{n} is {list(f)}, needs {list(w)}" for n, (f, w) in wrong_shape.items()]),
            ("there more than once", list(repeated)),
        )
        found = f" It looks like {looks}." if looks else ""
        fit = f" What fits: {_WOULD_FIT[component]}, of the version that the rest of the model has."
        super().__init__(
            f"{source}: the tensors do not fit the {component.replace('_', ' ')}.{found}{fit}"
            + "".join(f"\n{len(names)} {what}: {_first(names)}" for what, names in lists if names)
        )


def check(module: nn.Module, checkpoint: Checkpoint | Sequence[Checkpoint], component: str) -> None:
    """Raise unless the files' headers promise every tensor of the module once, in its shape, and no other.

    checkpoint: a file, or several that hold the component together (text head of 2.5).
    Raises MismatchError with all differences, or CheckpointError for quantised files.
    """
    files = _files(checkpoint)
    slots = _slots(module)
    for file, info, name in _component_tensors(files, component):
        packed = name in slots and slots[name].is_floating_point() != (info.dtype in FLOAT_DTYPES)
        if packed or info.name.endswith(_QUANTISED_SUFFIXES):
            raise quantised_error(file, info)
    found = [(info.name, name, info.shape) for _, info, name in _component_tensors(files, component)]
    _compare(slots, found, component, _source(files), " with ".join(file.looks_like() for file in files))


def assign(module: nn.Module, tensors: Iterable[tuple[str, Tensor]], *, component: str, source: str) -> None:
    """Make the tensors, under their checkpoint names, the module's parameters and persistent buffers.

    Parameters are taken over as they are (dtype, device, memory), without gradients. source: where the tensors come
    from, for messages. Raises MismatchError, after the last tensor, unless each slot was set once in its shape.
    """
    slots = _slots(module)
    found: list[tuple[str, str, Shape]] = []
    for checkpoint_key, tensor in tensors:
        name = module_name(component, checkpoint_key) or checkpoint_key
        found.append((checkpoint_key, name, tuple(tensor.shape)))
        if name in slots and slots[name].shape == tensor.shape:
            if slots[name].is_floating_point() != tensor.is_floating_point():
                raise CheckpointError(f"{source}: tensor {checkpoint_key} is {tensor.dtype}, needs {slots[name].dtype}")
            _set(module, name, tensor)
    _compare(slots, found, component, source, None)


def load_component(
    module: M,
    checkpoint: Checkpoint | Sequence[Checkpoint],
    component: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    on_bytes: Callable[[int], None] | None = None,
) -> M:
    """Fill a module that was built on the meta device from one file, or from several that hold it together.

    All floating tensors get ``dtype`` (the transformer's F32 tables too: the reference rounds them at use). The module
    is returned frozen and in inference behaviour. Raises before any data is read when the headers do not fit; see
    ``check`` and ``read_tensors`` for the errors.
    """
    files = _files(checkpoint)
    check(module, files, component)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for file in files:
            names = module_names(component, file.tensors)
            yield from read_tensors(file, names, device=device, dtype=dtype, on_bytes=on_bytes)

    assign(module, tensors(), component=component, source=_source(files))
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, f"{type(module).__name__} has buffers that no file can fill: {left}"
    return module.requires_grad_(False).train(False)


def component_bytes(checkpoint: Checkpoint | Sequence[Checkpoint], component: str) -> int:
    """How many bytes ``load_component`` will read: the total of its progress."""
    return sum(info.size_bytes for _, info, _ in _component_tensors(_files(checkpoint), component))


def _files(checkpoint: Checkpoint | Sequence[Checkpoint]) -> Sequence[Checkpoint]:
    return (checkpoint,) if isinstance(checkpoint, Checkpoint) else checkpoint


def _source(files: Sequence[Checkpoint]) -> str:
    return " + ".join(str(file.path) for file in files)


def _component_tensors(files: Sequence[Checkpoint], component: str) -> Iterator[tuple[Checkpoint, TensorInfo, str]]:
    for file in files:
        for name, ours in module_names(component, file.tensors).items():
            yield file, file.tensors[name], ours


def _slots(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, by the name that ``state_dict`` would give it."""
    return module.state_dict(keep_vars=True)


def _compare(
    slots: Mapping[str, Tensor],
    found: Sequence[tuple[str, str, Shape]],
    component: str,
    source: str,
    looks: str | None,
) -> None:
    """Compare a module's slots with (checkpoint name, module name, shape) of what was found."""
    counts: dict[str, int] = {}
    for _, name, _ in found:
        counts[name] = counts.get(name, 0) + 1
    missing = {checkpoint_name(component, name): tuple(t.shape) for name, t in slots.items() if name not in counts}
    unexpected = {key: shape for key, name, shape in found if name not in slots}
    wrong = {key: (s, tuple(slots[n].shape)) for key, n, s in found if n in slots and s != tuple(slots[n].shape)}
    repeated = [key for key, name, _ in found if counts[name] > 1]
    if missing or unexpected or wrong or repeated:
        raise MismatchError(
            source,
            component,
            looks,
            missing=missing,
            unexpected=unexpected,
            wrong_shape=wrong,
            repeated=repeated,
        )


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    is_parameter = leaf in owner._parameters
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
