"""Loading at full size: a transformer, a LoRA beside it, and changes of strength.

python benchmarks/bench_load.py

Files are random, written once and read from the page cache; every figure is the median of the repetitions, from the
header to the last tensor in place. Checks before it reports: bits of loaded tensors against the safetensors library,
overlapped against sequential merging, and the base after a LoRA was taken off.
bench_load_diffusers.py does the same through diffusers, bench_first_step.py measures until something is seen.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.loading.arena import Arena
from ltx2_engine.ltx2_core.loading.build import sources_of
from ltx2_engine.ltx2_core.loading.changes import Adapter, Adapters
from ltx2_engine.ltx2_core.loading.checkpoint import read_header
from ltx2_engine.ltx2_core.loading.lora.file import read_lora
from ltx2_engine.ltx2_core.loading.lora.strength import Strength
from ltx2_engine.ltx2_core.loading.pinned import PinnedMemory
from ltx2_engine.ltx2_core.loading.store import WeightStore
from ltx2_engine.ltx2_core.loading.while_loading import while_loading
from ltx2_engine.ltx2_core.networks import build_on_meta
from random_files import write_lora, write_transformer
from report import Row, write
from safetensors import safe_open
from temporary import temporary_folder

DEVICE = torch.device("cuda")
PROBE = "blocks.7.video.attn1.to_q.weight"


@while_loading
def new_store(path: Path, model: ModelConfig, policy: str | None = None, device: torch.device = DEVICE) -> WeightStore:
    """A store for a transformer, from its file's header on, as an engine and a component make it."""
    sources = sources_of((read_header(path),), "transformer")
    module = build_on_meta("transformer", model)
    store = WeightStore(module, sources, device=device, dtype=torch.bfloat16)
    for block in module.blocks:
        store.give_memory_later(block, partial(Arena.of, device=device, pin=False))
    store.pristine.policy = policy
    return store


def timed(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def empty_cache() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def link_rate() -> float:
    """Bytes a second from pinned memory to the device."""
    host = PinnedMemory(4 << 30)
    device = torch.empty(4 << 30, dtype=torch.uint8, device=DEVICE)
    seconds = median(timed(lambda: device.copy_(host.memory, non_blocking=True)) for _ in range(5))
    host.close()
    return (4 << 30) / seconds


def loads(
    path: Path, model: ModelConfig, adapters: Adapters, *, repeat: int, policy: str | None, overlap: bool = True
) -> tuple[float, WeightStore]:
    """Seconds of loads from nothing, and the last store."""
    seconds = []
    for _ in range(repeat):
        stores: list[WeightStore] = []

        @while_loading
        def load(stores: list[WeightStore] = stores) -> None:
            stores.append(new_store(path, model, policy))
            stores[0].converge(lambda: adapters, overlap=overlap)

        empty_cache()
        seconds.append(timed(load))
    return median(seconds), stores.pop()


def classical(path: Path, lora: Path, model: ModelConfig) -> float:
    """Our staged base, then every factor by safe_open, then a bfloat16 product and sum a layer."""

    def load() -> None:
        store = new_store(path, model)
        store.converge(tuple)
        layers = read_lora(lora).layers
        with safe_open(lora, framework="pt") as file:
            factors = {key: file.get_tensor(key).to("cuda") for key in file.keys()}  # noqa: SIM118
        for layer in layers.values():
            weight = store.module.get_parameter(f"{layer.owner}.weight")
            weight += factors[layer.tensors["B"].name] @ factors[layer.tensors["A"].name]

    empty_cache()
    return timed(load)


BARS = {"pinned": "<= 1.5", "pair": "<= 0.5", "side": "<= 0.1", "file": ""}


def strength_changes(path: Path, lora: Path, model: ModelConfig, repeat: int, policy: str) -> list[Row]:
    """Seconds from one strength to another with one way back; checks that the base comes back."""
    empty_cache()
    store, pieces, rows = new_store(path, model, policy), [], []
    store.converge(tuple)
    base = store.module.get_parameter(PROBE).clone()
    adapters = [(Adapter(read_lora(lora), Strength.both(strength)),) for strength in (1.0, 0.25, 0.5, 0.75, 0.125)]

    def pinned(count: int) -> torch.Tensor:
        pieces.append(PinnedMemory(count))
        return pieces[-1].memory

    store.converge(lambda: adapters[0])
    if policy == "pinned":
        seconds = timed(lambda: store.keep_in(pinned, lambda: False))
        rows.append(Row("bases to pinned memory, in the background", seconds, "s"))
    changes = [timed(lambda one=one: store.converge(lambda: one)) for one in adapters[1 : repeat + 1]]
    rows.append(Row(f"strength change, {policy}", median(changes), "s", BARS[policy]))
    rows.append(Row(f"LoRA off, {policy}", timed(lambda: store.converge(tuple)), "s"))
    if policy == "pair":
        again = timed(lambda: store.converge(lambda: adapters[repeat]))
        rows.append(Row("the same LoRA on again, pair", again, "s"))
        store.converge(tuple)
    if not torch.equal(store.module.get_parameter(PROBE), base):
        raise SystemExit(f"{policy}: the base did not come back: no figures")
    for piece in pieces:
        piece.close()
    return rows


def check(path: Path, store: WeightStore) -> None:
    with safe_open(path, framework="pt") as file:
        for slot in store._slots[::97]:
            want = file.get_tensor(slot.source.weight.name).cuda()
            assert torch.equal(store.module.get_parameter(slot.name), want), slot.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", default="2.3")
    parser.add_argument("--rank", type=int, default=384)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layers", type=int, help="fewer blocks, for a small card")
    parser.add_argument("--folder", type=Path, help="where the files go; by default a temporary folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    config = released_config(options.version)
    if options.layers:
        config["transformer"]["num_layers"] = options.layers
    model = ModelConfig.from_config(config, 49, ())
    rows: list[Row] = []
    with temporary_folder(options.folder) as folder, torch.no_grad():
        path, lora = folder / "transformer.safetensors", folder / "lora.safetensors"
        rows.append(
            Row("writing the files", timed(lambda: write_transformer(path, config, model, options.version)), "s")
        )
        write_lora(lora, model, options.rank)
        rows += measure(path, lora, model, options.repeat)
    print(write(options.out, f"load_{options.version}", rows).read_text())


def measure(path: Path, lora: Path, model: ModelConfig, repeat: int) -> list[Row]:
    adapters = (Adapter(read_lora(lora), Strength.both(1.0)),)
    size, lora_size = path.stat().st_size, lora.stat().st_size
    loads(path, model, adapters, repeat=1, policy="pair")  # touches host memory and the page cache once
    empty_cache()
    rate = link_rate()
    base, store = loads(path, model, (), repeat=repeat, policy=None)
    check(path, store)
    del store
    overlapped, store = loads(path, model, adapters, repeat=repeat, policy="pair")
    merged = store.module.get_parameter(PROBE).clone()
    del store
    sequential, store = loads(path, model, adapters, repeat=repeat, policy="pair", overlap=False)
    if not torch.equal(store.module.get_parameter(PROBE), merged):
        raise SystemExit("overlap changes bits: no figures")
    del store
    old = median(classical(path, lora, model) for _ in range(repeat))
    rows = [
        Row("transformer", size / 1e9, "GB"),
        Row("LoRA", lora_size / 1e9, "GB"),
        Row("pinned host to device", rate / 1e9, "GB/s"),
        Row("transformer: time", base, "s"),
        Row("transformer: rate", size / base / 1e9, "GB/s"),
        Row("transformer: share of the pinned rate", size / base / rate, "1", ">= 0.60"),
        Row("transformer + LoRA, overlapped: time", overlapped, "s"),
        Row("transformer + LoRA, one after the other: time", sequential, "s"),
        Row("transformer + LoRA, classical order: time", old, "s"),
        Row("overlapped / transformer alone", overlapped / base, "1", "<= 1.30"),
        Row("bytes alone", (size + lora_size) / size, "1"),
        Row("overlapped / classical order", overlapped / old, "1", "<= 0.80"),
    ]
    for policy in BARS:
        rows += strength_changes(path, lora, model, repeat, policy)
    return rows


if __name__ == "__main__":
    main()
