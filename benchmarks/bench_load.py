"""Loading at full size: a transformer, a LoRA beside it, changes of strength, and the time until something is seen.

python benchmarks/bench_load.py
python benchmarks/bench_load.py --diffusers    (the same files through diffusers, accelerate and peft)

Files are random, written once and read from the page cache; every figure is the median of the repetitions, from the
header to the last tensor in place. Checks before it reports: bits of a loaded tensor against the safetensors library,
overlapped against sequential merging, and the base after a LoRA was taken off.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.loading.build import sources_of
from ltx2_engine.ltx2_core.loading.changes import Adapter
from ltx2_engine.ltx2_core.loading.checkpoint import read_header
from ltx2_engine.ltx2_core.loading.lora.file import read_lora
from ltx2_engine.ltx2_core.loading.lora.strength import Strength
from ltx2_engine.ltx2_core.loading.pinned import PinnedMemory
from ltx2_engine.ltx2_core.loading.store import WeightStore
from ltx2_engine.ltx2_core.networks import build_on_meta
from random_files import write_transformer, write_lora
from report import Row, write
from safetensors import safe_open

DEVICE = torch.device("cuda")
PROBE = "blocks.7.video.attn1.to_q.weight"


def new_store(path: Path, model: ModelConfig, policy: str | None = None) -> WeightStore:
    """A store for a transformer, from its file's header on."""
    sources = sources_of((read_header(path),), "transformer")
    store = WeightStore(build_on_meta("transformer", model), sources, device=DEVICE, dtype=torch.bfloat16)
    store.pristine.policy = policy
    return store


def timed(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def emptied() -> Iterator[None]:
    """Device memory is given back before and after."""
    for _ in range(2):
        gc.collect()
        torch.cuda.empty_cache()
        if _ == 0:
            yield


def link_rate() -> float:
    """Bytes a second from pinned memory to the device."""
    host = PinnedMemory(4 << 30)
    device = torch.empty(4 << 30, dtype=torch.uint8, device=DEVICE)
    seconds = median(timed(lambda: device.copy_(host.memory, non_blocking=True)) for _ in range(5))
    host.close()
    return (4 << 30) / seconds


def loads(path: Path, model: ModelConfig, adapters: tuple, *, repeat: int, policy: str | None, overlap: bool = True):
    """Seconds of loads from nothing; the last store is returned too."""
    seconds, store = [], None
    for _ in range(repeat):
        store = None
        with emptied():

            def load() -> None:
                nonlocal store
                store = new_store(path, model, policy)
                store.converge(lambda: adapters, overlap=overlap)

            seconds.append(timed(load))
    return median(seconds), store


def classical(path: Path, lora: Path, model: ModelConfig) -> float:
    """Our staged base, then every factor by safe_open, then a bfloat16 product and sum a layer."""

    def load() -> None:
        store = new_store(path, model)
        store.converge(tuple)
        layers = read_lora(lora).layers
        with safe_open(lora, framework="pt") as file:
            factors = {key: file.get_tensor(key).to("cuda") for key in file.keys()}
        for layer in layers.values():
            weight = store.module.get_parameter(f"{layer.owner}.weight")
            weight += factors[layer.tensors["B"].name] @ factors[layer.tensors["A"].name]

    with emptied(), torch.no_grad():
        return timed(load)


def strength_changes(path: Path, lora: Path, model: ModelConfig, repeat: int) -> Iterator[Row]:
    """Seconds from one strength to another, for every way back; checks that the base comes back."""
    bars = {"pinned": "<= 1.5", "pair": "<= 0.5", "side": "<= 0.1", "file": ""}
    for policy, bar in bars.items():
        with emptied():
            store, pieces = new_store(path, model, policy), []
            store.converge(tuple)
            base = store.module.get_parameter(PROBE).clone()
            file = read_lora(lora)
            store.converge(lambda: (Adapter(file, Strength.both(1.0)),))
            if policy == "pinned":

                def pinned(count: int) -> torch.Tensor:
                    pieces.append(PinnedMemory(count))
                    return pieces[-1].memory

                seconds = timed(lambda: store.keep_in(pinned, lambda: False))
                yield Row("bases to pinned memory, in the background", seconds, "s")
            seconds = []
            for number in range(repeat):
                adapter = Adapter(file, Strength.both(0.25 + number / 8))
                seconds.append(timed(lambda: store.converge(lambda: (adapter,))))
            yield Row(f"strength change, {policy}", median(seconds), "s", bar)
            yield Row(f"LoRA off, {policy}", timed(lambda: store.converge(tuple)), "s")
            if policy == "pair":
                yield Row("the same LoRA on again, pair", timed(lambda: store.converge(lambda: (adapter,))), "s")
                store.converge(tuple)
            assert torch.equal(store.module.get_parameter(PROBE), base), f"{policy}: the base did not come back"
            for piece in pieces:
                piece.close()
            del store, base
    return


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
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, torch.no_grad():
        path, lora = Path(folder) / "transformer.safetensors", Path(folder) / "lora.safetensors"
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
    rate = link_rate()
    base, store = loads(path, model, (), repeat=repeat, policy=None)
    check(path, store)
    store = None
    overlapped, store = loads(path, model, adapters, repeat=repeat, policy="pair")
    merged = store.module.get_parameter(PROBE).clone()
    store = None
    sequential, store = loads(path, model, adapters, repeat=repeat, policy="pair", overlap=False)
    assert torch.equal(store.module.get_parameter(PROBE), merged), "overlap changes bits"
    store = None
    old = median(classical(path, lora, model) for _ in range(repeat))
    return [
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
        *strength_changes(path, lora, model, repeat),
    ]


if __name__ == "__main__":
    main()
