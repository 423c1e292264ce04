"""What identifies a loaded model. Torch-free, so that nodes can make one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .config.numerics import NUMERICS

DTYPES = ("auto", "bfloat16", "float32")
# all attentions have so many heads, which ranks share
_HEADS = 32
MAX_RANKS = 8
RANKS = tuple(count for count in range(1, MAX_RANKS + 1) if _HEADS % count == 0)
# "groups x ranks of a group" for every number of ranks
TOPOLOGIES = (
    "auto",
    *(f"{groups}x{ranks // groups}" for ranks in RANKS[1:] for groups in RANKS if ranks % groups == 0),
)

# path, size and time of change: a replaced file is another file
Identity = tuple[str, int, int]


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA and how strongly it counts; 1 is what it was trained for.

    video, audio: factors of the strength in each stream. parity: the arithmetic of merging, "float32" (one rounding) or
    "ltx-core" (that of ltx-core 1.0.0, which ignores alpha).
    """

    path: Path
    strength: float
    identity: Identity
    video: float = 1.0
    audio: float = 1.0
    parity: str = "float32"


@dataclass(frozen=True)
class ModelSpec:
    """One model on one device, or on several that make a clip together.

    checkpoint: the file with the transformer, and with every other part for which no file is named.
    text_encoder: its folder or file. video_vae, audio_vae (with the vocoder), text_projection (with or without the
    connectors): files that hold these parts instead. dtype: ``bfloat16`` or ``float32``.
    identity: of every file. loras: added to the transformer in this order. limit_gib: the most memory of the device
    that weights and work of a network may take together; 0 leaves it to the host. numerics: how exactly the transformer
    computes, one of ``config.numerics.NUMERICS``. ranks: how many devices make a clip together, from ``device`` on, one of
    ``RANKS``. topology: how they share guidance passes, one of ``TOPOLOGIES``: "2x4" is two groups of four.
    """

    checkpoint: Path
    text_encoder: Path
    dtype: str
    device: str
    identity: tuple[Identity, ...]
    loras: tuple[LoraSpec, ...] = ()
    video_vae: Path | None = None
    audio_vae: Path | None = None
    text_projection: Path | None = None
    limit_gib: float = 0.0
    numerics: str = "exact"
    ranks: int = 1
    topology: str = "auto"

    @classmethod
    def of(
        cls,
        checkpoint: Path,
        text_encoder: Path,
        *,
        dtype: str,
        device: str,
        video_vae: Path | None = None,
        audio_vae: Path | None = None,
        text_projection: Path | None = None,
        limit_gib: float = 0.0,
        numerics: str = "exact",
        ranks: int = 1,
        topology: str = "auto",
    ) -> ModelSpec:
        """The spec of these files as they are now. ``auto`` is bfloat16 on a GPU and float32 on the CPU.

        Raises ValueError for an unknown dtype, for unknown numerics, for numerics that the dtype does not allow, and for
        ranks that cannot share a clip, OSError for a file that is not there.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not known; choose {', '.join(DTYPES)}")
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        if numerics not in NUMERICS:
            raise ValueError(f"numerics {numerics!r} are not known; choose {', '.join(NUMERICS)}")
        if numerics == "fp8" and dtype != "bfloat16":
            raise ValueError(
                f"numerics fp8 needs bfloat16, and the dtype is {dtype} (auto is float32 on the CPU): choose dtype bfloat16, "
                "or numerics exact or fast"
            )
        _check_ranks(ranks, topology)
        components = filter(None, (video_vae, audio_vae, text_projection))
        files = [checkpoint, *components, *_text_encoder_files(text_encoder)]
        return cls(
            checkpoint,
            text_encoder,
            dtype,
            device,
            tuple(map(_identity, files)),
            video_vae=video_vae,
            audio_vae=audio_vae,
            text_projection=text_projection,
            limit_gib=limit_gib,
            numerics=numerics,
            ranks=ranks,
            topology=topology,
        )

    def with_lora(
        self, path: Path, strength: float, *, video: float = 1.0, audio: float = 1.0, parity: str = "float32"
    ) -> ModelSpec:
        """This model with one LoRA more.

        Raises ValueError for a strength that is not a number from -10 to 10, and for another parity than that of the
        LoRAs before it: they are merged in one sum.
        """
        for name, value in (("strength", strength), ("video", strength * video), ("audio", strength * audio)):
            if not (math.isfinite(value) and abs(value) <= 10):
                raise ValueError(
                    f"{path.name}: a LoRA's strength must be a number from -10 to 10, found {name} {value}"
                )
        if any(one.parity != parity for one in self.loras):
            raise ValueError(
                f"{path.name}: its precision is {parity}, that of {self.loras[0].path.name} is {self.loras[0].parity}: "
                "choose one for all LoRAs of a model"
            )
        return replace(self, loras=(*self.loras, LoraSpec(path, strength, _identity(path), video, audio, parity)))

    @property
    def limit_bytes(self) -> int | None:
        return int(self.limit_gib * 2**30) if self.limit_gib else None

    @property
    def base(self) -> ModelSpec:
        """The model without its LoRAs."""
        return replace(self, loras=())

    def of_rank(self, device: str) -> ModelSpec:
        """This model on the device of one of its ranks."""
        return replace(self, device=device)


def rank_devices(device: str, ranks: int, present: Sequence[str]) -> tuple[str, ...]:
    """The devices of so many ranks: GPUs from ``device`` on, or the CPU for each.

    present: the devices that there are, such as ``cuda:0`` and ``cpu``. Raises ValueError when they are too few.
    """
    if ranks == 1 or device == "cpu":
        return (device,) * ranks
    kind, _, index = device.partition(":")
    if kind != "cuda":
        raise ValueError(
            f"several devices make a clip together where they are cuda or cpu; {device} works alone: set gpus to 1"
        )
    wanted = tuple(f"{kind}:{int(index or 0) + rank}" for rank in range(ranks))
    missing = [one for one in wanted if one not in present]
    if missing:
        raise ValueError(
            f"{ranks} GPUs from {device} on were asked for; {missing[0]} is not there. This machine has "
            f"{', '.join(present)}: choose fewer GPUs, or another first device"
        )
    return wanted


def _check_ranks(ranks: int, topology: str) -> None:
    if ranks not in RANKS:
        raise ValueError(
            f"{ranks} GPUs cannot share a clip: the model has {_HEADS} attention heads, which they share evenly. Choose "
            f"{', '.join(map(str, RANKS))}"
        )
    if topology not in TOPOLOGIES:
        raise ValueError(f"there is no topology {topology!r}; choose {', '.join(TOPOLOGIES)}")
    if topology != "auto" and math.prod(map(int, topology.split("x"))) != ranks:
        fitting = [one for one in TOPOLOGIES[1:] if math.prod(map(int, one.split("x"))) == ranks]
        raise ValueError(f"topology {topology} is not one of {ranks} GPUs; choose {', '.join(['auto', *fitting])}")


def _text_encoder_files(path: Path) -> list[Path]:
    return (
        sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json", ".model"))
        if path.is_dir()
        else [path]
    )


def _identity(path: Path) -> Identity:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
