"""What the links of a graph carry, and the engines behind it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .av import AV
from .engine import LocalEngine
from .loading.lora.file import read_lora, reference_factors
from .loading.while_loading import while_loading
from .model_spec import ModelSpec
from .preflight import open_files
from .ranks import ALONE, ranks_of_process
from .sampling.guidance import StreamGuidance
from .text.context import Context

if TYPE_CHECKING:
    from .fleet.engine import FleetEngine

_engines: weakref.WeakValueDictionary[ModelSpec, LocalEngine | FleetEngine] = weakref.WeakValueDictionary()


@while_loading
def open_engine(spec: ModelSpec) -> LocalEngine | FleetEngine:
    """The engine of these files on these devices; the one that is already there, if any handle still holds it.

    Engines of one model with different LoRAs share every network but the transformer. Raises ValueError for more devices
    than there are.
    """
    engine = _engines.get(spec)
    if engine is None:
        if spec.ranks > 1 and ranks_of_process() is not ALONE:
            raise ValueError(
                f"torchrun has started one process for each GPU: choose 1 GPU in the model, not {spec.ranks}"
            )
        if spec.ranks > 1:
            from .fleet.engine import FleetEngine

            engine = FleetEngine(open_files(spec))
        elif spec.loras:
            base = open_engine(spec.base)
            assert isinstance(base, LocalEngine), "an engine and its base have as many ranks"
            engine = LocalEngine(replace(base.files, spec=spec), base)
            engine.expect_loras()
        else:
            engine = LocalEngine(open_files(spec), ranks=ranks_of_process())
        _engines[spec] = engine
    return engine


@dataclass(frozen=True)
class ModelHandle:
    """What an LTX2_MODEL link carries: a reference to an engine, no weights of its own."""

    spec: ModelSpec
    engine: LocalEngine | FleetEngine = field(repr=False, compare=False)

    @property
    def label(self) -> str:
        return self.engine.files.version.label

    def start(self) -> ModelHandle:
        """Begin to read the model's files in the background; returns this handle."""
        self.engine.start()
        return self

    def with_lora(
        self, path: Path, strength: float, *, video: float = 1.0, audio: float = 1.0, parity: str = "float32"
    ) -> ModelHandle:
        """A handle of this model with one LoRA more; this one stays as it is.

        video, audio: factors of the strength in each stream. parity: as in ``LoraSpec``. Raises as ``read_lora`` and
        ``match`` do.
        """
        spec = self.spec.with_lora(path, strength, video=video, audio=audio, parity=parity)
        return ModelHandle(spec, open_engine(spec))

    def lora_report(self) -> str:
        """What the model's LoRAs change, and what in their files is not used."""
        return str(self.engine.lora_report or "no LoRA")

    def reference_factors(self) -> tuple[int, int]:
        """How much smaller and how much sparser reference videos are, as the LoRAs' files say; 1 and 1 without."""
        return reference_factors([read_lora(one.path) for one in self.spec.loras])

    def __str__(self) -> str:
        loras = "".join(f", {one.path.name} {one.strength:g}" for one in self.spec.loras)
        devices = f"{self.spec.ranks} x {self.spec.device}" if self.spec.ranks > 1 else self.spec.device
        return f"LTX-{self.label} ({self.spec.checkpoint.name}{loras}, {self.spec.dtype}, {devices})"


@dataclass(frozen=True)
class Guider:
    """What an LTX2_GUIDER link carries: a model, its prompts, how strongly to guide and how passes are evaluated."""

    model: ModelHandle
    positive: Context
    negative: Context | None
    guidance: AV[StreamGuidance]
    evaluation: str = "auto"
