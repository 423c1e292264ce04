"""One rank of bench_ranks_load.py: loads a transformer, beside others that load it too and together with them.

python benchmarks/ranks_load.py FOLDER    (see ranks.py)
"""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pack  # noqa: F401
import torch
from bench_load import empty_cache, new_store
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.loading.changes import Adapter
from ltx2_engine.ltx2_core.loading.lora.file import read_lora
from ltx2_engine.ltx2_core.loading.lora.strength import Strength
from ltx2_engine.ltx2_core.loading.store import WeightStore
from ltx2_engine.ltx2_core.loading.together import plan
from ltx2_engine.ltx2_core.loading.while_loading import while_loading
from ltx2_engine.ltx2_core.parallel.gates import Board
from ltx2_engine.ltx2_core.parallel.sharing import Sharing
from ltx2_engine.ltx2_core.tiny import tiny_config
from ranks import Rank, main_of_rank
from timing import settle

ALONE, SHARED = "each reads all", "each reads its share"
# by case: whether there is a LoRA
CASES = {"transformer": False, "transformer + LoRA": True}


@dataclass(frozen=True)
class Job:
    """The files, which are in a folder, and how often each is loaded in each way."""

    folder: str
    repeats: int
    tiny: bool

    @property
    def transformer(self) -> Path:
        return Path(self.folder) / "transformer.safetensors"

    @property
    def lora(self) -> Path:
        return Path(self.folder) / "lora.safetensors"

    @property
    def config(self) -> dict[str, Any]:
        return tiny_config("2.3") if self.tiny else released_config("2.3")

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.from_config(self.config, 7 if self.tiny else 49, ())


@dataclass
class Loads:
    """This rank's loads. Readings are counted, as every one that is shared needs a number of its own."""

    job: Job
    rank: Rank
    board: Board
    readings: int = field(default=0)

    @while_loading
    def load(self, adapters: tuple[Adapter, ...], how: str) -> WeightStore:
        """A store with all weights in place."""
        policy = "pair" if adapters else None
        store, share = new_store(self.job.transformer, self.job.model, policy, self.rank.device), None
        if how == SHARED:
            assert plan(store, adapters) is not None, "there is something to share"
            self.readings += 1
            share = Sharing(self.board, self.rank.rank, self.readings, self.rank.device)
        store.converge(lambda: adapters, share=share)
        return store

    def timed(self, adapters: tuple[Adapter, ...], how: str) -> tuple[float, str]:
        """Seconds from when all ranks have begun until this one is done, and the bits it holds then."""
        if self.rank.device.type == "cuda":
            empty_cache()
        self.rank.meet()
        start = time.perf_counter()
        store = self.load(adapters, how)
        settle(self.rank.device)
        seconds = time.perf_counter() - start
        bits = digest(store)
        self.rank.meet()
        return seconds, bits


def digest(store: WeightStore) -> str:
    """The bits of all weights: of every tensor a sum in integers and one that knows the order."""
    sums = []
    for _, tensor in sorted(store.module.named_parameters()):
        bits = tensor.detach().flatten().view(torch.uint8)
        wide = bits[: bits.numel() // 8 * 8].view(torch.int64)
        turns = torch.arange(1, wide.numel() + 1, device=wide.device)
        sums += [wide.sum(), (wide * turns).sum(), bits.to(torch.int64).sum()]
    return hashlib.sha256(torch.stack(sums).cpu().numpy().tobytes()).hexdigest()


def work(rank: Rank, given: dict[str, Any]) -> dict[str, Any]:
    job = Job(**given)
    loads = Loads(job, rank, Board(Path(sys.argv[1]) / "board", rank.size))
    found: dict[str, Any] = {}
    for case, has_lora in CASES.items():
        adapters = (Adapter(read_lora(job.lora), Strength.both(1.0)),) if has_lora else ()
        for how in (ALONE, SHARED) if rank.size > 1 else (ALONE,):
            # the first one touches host memory
            runs = [loads.timed(adapters, how) for _ in range(1 + job.repeats)]
            found[f"{case}, {how}"] = {"seconds": [s for s, _ in runs[1:]], "bits": sorted({bits for _, bits in runs})}
    return found


if __name__ == "__main__":
    main_of_rank(work)
