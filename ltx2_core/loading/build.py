"""Whether files hold what a module needs, strictly, and which of their weights goes where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .checkpoint import FLOAT_DTYPES, Checkpoint, CheckpointError
from .keymap import checkpoint_name, module_names
from .weights import Weight, weights_of

Shape = tuple[int, ...]

_SHOWN = 12

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


class Source(NamedTuple):
    """Where one parameter or buffer of a module comes from. name: its name in the module."""

    name: str
    file: Checkpoint
    weight: Weight

    @property
    def elements(self) -> int:
        return math.prod(self.weight.shape)


def sources_of(files: Sequence[Checkpoint], component: str) -> list[Source]:
    """The weights of a component, file by file, each file in its order."""
    return [
        Source(ours, file, weights_of(file)[name])
        for file in files
        for name, ours in module_names(component, weights_of(file)).items()
    ]


def check(module: nn.Module, checkpoint: Checkpoint | Sequence[Checkpoint], component: str) -> None:
    """Raise unless the files' headers promise every tensor of the module once, in its shape, and no other.

    checkpoint: a file, or several that hold the component together (text head of 2.5).
    Raises MismatchError with all differences, or CheckpointError for a weight stored as integers.
    """
    files = (checkpoint,) if isinstance(checkpoint, Checkpoint) else checkpoint
    found = sources_of(files, component)
    slots = module.state_dict(keep_vars=True)
    _compare(slots, found, component, files)
    for source in found:
        info = source.weight.parts["data"]
        if source.weight.format == "plain" and slots[source.name].is_floating_point() != (info.dtype in FLOAT_DTYPES):
            raise CheckpointError(
                f"{source.file.path}: tensor {info.name!r} is stored as {info.dtype}, without what tells how to unpack it: "
                "use another file of the same release"
            )


def _compare(slots: Mapping[str, Tensor], found: Sequence[Source], component: str, files: Sequence[Checkpoint]) -> None:
    counts: dict[str, int] = {}
    for source in found:
        counts[source.name] = counts.get(source.name, 0) + 1
    missing = {checkpoint_name(component, name): tuple(t.shape) for name, t in slots.items() if name not in counts}
    unexpected = {s.weight.name: s.weight.shape for s in found if s.name not in slots}
    wrong = {
        s.weight.name: (s.weight.shape, tuple(slots[s.name].shape))
        for s in found
        if s.name in slots and s.weight.shape != tuple(slots[s.name].shape)
    }
    repeated = [s.weight.name for s in found if counts[s.name] > 1]
    if missing or unexpected or wrong or repeated:
        raise MismatchError(
            " + ".join(str(file.path) for file in files),
            component,
            " with ".join(file.looks_like() for file in files),
            missing=missing,
            unexpected=unexpected,
            wrong_shape=wrong,
            repeated=repeated,
        )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
