"""One rank: reads a transformer together with the others, in every way, and writes down what it holds then.

python sharing_rank.py RANK SIZE FOLDER
"""

import hashlib
import json
import sys
import threading
import time
import types
from datetime import timedelta
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

# file of weights, how they are held, the way back from LoRAs, the lists of LoRAs one after the other
FORMATS = ("bf16", "fp8", "fp8_cast", "nvfp4", "q8_0", "in fp8")
POLICIES = ("pair", "pinned", "file", "side")
LORAS = ((("low", 0.7), ("full", 1.0)), (("low", 0.3),), (), (("low", 0.7),))
CASES = {
    **{format: (format, None, ((),)) for format in FORMATS},
    **{
        f"{format}, {policy}": (format, policy, LORAS)
        for format in ("bf16", "fp8", "fp8_cast", "in fp8", "q8_0")
        for policy in POLICIES
    },
    "nvfp4, low rank": ("nvfp4", "side", ((("low", 0.7),), (("low", 0.3),), ())),
}


def cases_of(size):
    """More than two ranks do every format and every policy, but not all pairs of them."""
    return CASES if size <= 2 else {name: case for name, case in CASES.items() if name in FORMATS or "bf16" in name}


class Rank:
    def __init__(self, rank, size, folder):
        self.rank, self.size, self.folder = rank, size, folder
        self.readings = 0
        # of every call, for threads count at the same time
        self.reads = []
        self.results = {}
        self.board = self.control = None

    @property
    def read_bytes(self):
        return sum(self.reads)

    def join(self):
        from ltx2_engine.ltx2_core.parallel.collectives import Control, join
        from ltx2_engine.ltx2_core.parallel.gates import Board

        if self.size > 1:
            timeout = timedelta(seconds=60)
            join(self.rank, self.size, self.folder / f"store-{self.size}", backend="gloo", timeout=timeout)
            self.control = Control(timeout)
            self.board = Board(self.folder / f"board-{self.size}", self.size)

    def meet(self):
        if self.control is not None:
            self.control.exchange(b"here")

    def share(self):
        import torch
        from ltx2_engine.ltx2_core.parallel.sharing import Sharing

        self.meet()
        self.readings += 1
        return None if self.size == 1 else Sharing(self.board, self.rank, self.readings, torch.device("cpu"))

    def store(self, format, policy):
        import torch
        from ltx2_engine.ltx2_core.config.model import ModelConfig
        from ltx2_engine.ltx2_core.config.numerics import in_eight_bits
        from ltx2_engine.ltx2_core.loading.arena import Arena
        from ltx2_engine.ltx2_core.loading.build import sources_of
        from ltx2_engine.ltx2_core.loading.checkpoint import read_header
        from ltx2_engine.ltx2_core.loading.store import WeightStore
        from ltx2_engine.ltx2_core.networks import build_on_meta
        from ltx2_engine.ltx2_core.tiny import tiny_config

        module = build_on_meta("transformer", ModelConfig.from_config(tiny_config("2.3"), 7, ()))
        name = {"in fp8": "bf16.safetensors", "q8_0": "q8_0.gguf"}.get(format, f"{format}.safetensors")
        store = WeightStore(
            module,
            sources_of((read_header(self.folder / name),), "transformer"),
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            keeps_packed=lambda name: name.startswith("blocks."),
            eight_bit=in_eight_bits if format == "in fp8" else lambda name: False,
        )
        store.pristine.policy = policy
        for block in module.blocks:
            store.give_memory_later(block, partial(Arena.of, device="cpu", pin=False))
        return store

    def adapters(self, names):
        from ltx2_engine.ltx2_core.loading.changes import Adapter
        from ltx2_engine.ltx2_core.loading.lora.file import read_lora
        from ltx2_engine.ltx2_core.loading.lora.strength import Strength

        return tuple(
            Adapter(read_lora(self.folder / f"{name}.safetensors"), Strength(value, value)) for name, value in names
        )

    # cases

    def case(self, name, format, policy, lists):
        from ltx2_engine.ltx2_core.loading.together import plan

        store = self.store(format, policy)
        for number, names in enumerate(lists):
            adapters, counted, before = self.adapters(names), [], self.read_bytes
            planned = self.results[f"{name}/{number}/plan"] = plan(store, adapters)
            self.results[f"{name}/{number}/expected"] = store.expected_bytes(adapters)
            share = None if planned is None else self.share()
            store.converge(lambda adapters=adapters: adapters, share=share, on_bytes=counted.append)
            self.results[f"{name}/{number}/bits"] = self.bits(store)
            self.results[f"{name}/{number}/read"] = self.read_bytes - before
            self.results[f"{name}/{number}/counted"] = sum(counted)
            self.results[f"{name}/{number}/states"] = sorted({repr(slot.state) for slot in store._slots})
            kept = sorted((n, d.hex()) for n, d in self.kept(store))
            self.results[f"{name}/{number}/kept"] = hashlib.sha256(repr(kept).encode()).hexdigest(), len(kept)
        assert plan(store, adapters) is None, "there is nothing left to read"

    def bits(self, store):
        import torch

        state = store.module.state_dict()
        return {
            key: (str(t.dtype), hashlib.sha256(t.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest())
            for key, t in state.items()
        }

    def kept(self, store):
        import torch

        for name, value in store.pristine._base.items():
            for role, t in value.items():
                yield f"{name} {role}", hashlib.sha256(t.contiguous().reshape(-1).view(torch.uint8).numpy()).digest()

    def ends(self, name, at_rank=lambda store: None, *, begin=True, stopped=None, names=(), policy=None):
        """A reading that ends early, and how; then one that works. at_rank: done by rank 1 before it reads.

        names: LoRAs that a complete network shall get; without them it is read.
        """
        from ltx2_engine.ltx2_core.loading.checkpoint import CheckpointError

        adapters, store = self.adapters(names), self.store("bf16", policy)
        if names:
            store.converge(tuple)
        share = self.share()
        acts = self.rank == 1
        try:
            if acts:
                at_rank(store)
            if acts and not begin:
                share.close()
            store.converge(lambda: adapters, share=share, stopped=stopped if acts else None)
            error = None
        except CheckpointError as caught:
            error = f"CheckpointError: {caught}"
        except BaseException as caught:
            error = f"{type(caught).__name__}: {caught}"
        self.results[f"{name}/error"], self.results[f"{name}/time"] = error, time.monotonic()
        self.results[f"{name}/complete"] = store.complete
        self.results[f"{name}/threads"] = [t.name for t in threading.enumerate() if t.name.startswith("ltx2")]
        self.breaks = self.pause = None
        # with the store as it was left: each goes on alone, or all together from the beginning
        store.converge(lambda: adapters)
        self.results[f"{name}/alone"] = self.bits(store)
        store.converge(tuple)
        self.results[f"{name}/back"] = self.bits(store)
        store = self.store("bf16", policy)
        store.converge(lambda: adapters, share=self.share())
        self.results[f"{name}/again"] = self.bits(store)

    breaks = pause = None

    def patch_reading(self):
        from ltx2_engine.ltx2_core.loading import ring

        read = ring._read_at

        def read_at(file, buffers, offset):
            if self.breaks is not None and self.read_bytes > self.breaks:
                return 0
            if self.pause is not None:
                time.sleep(self.pause)
            count = read(file, buffers, offset)
            self.reads.append(count)
            return count

        ring._read_at = read_at
        # some chunks, so that reading has a middle
        ring.SLOT_BYTES = ring.CHUNK_BYTES = ring.MIN_CHUNK_BYTES = 1 << 16

    def failures(self):
        def cut(store):
            # in the middle of its share
            self.breaks = self.read_bytes + self.results["bf16/0/read"] // 2
            self.results["cut/began"] = time.monotonic()

        def begin(store):
            self.pause, self.stops = 0.1, self.read_bytes

        def stopped():
            """As soon as this rank has read anything."""
            stops = self.read_bytes > self.stops
            if stops:
                self.results.setdefault(f"{name}/began", time.monotonic())
            return stops

        def leave(store):
            self.results["leave/began"] = time.monotonic()

        self.ends("cut", cut)
        self.ends("leave", leave, begin=False)
        for name, names, policy in (
            ("stop", (), None),
            ("change, pair", LORAS[0], "pair"),
            ("change, file", LORAS[0], "file"),
        ):
            self.ends(name, begin, stopped=stopped, names=names, policy=policy)
        # rank 0 decides for all, whether or not it has begun to read
        share = self.share()
        if self.rank:
            store = self.store("bf16", None)
            try:
                store.converge(tuple, share=share, stopped=lambda: self.rank == 1)
            except BaseException as error:
                self.results["late/error"] = f"{type(error).__name__}: {error}"
        else:
            deadline = time.monotonic() + 10
            while not share.over() and time.monotonic() < deadline:
                time.sleep(0.01)
            self.results["late/over"] = share.over()
        # the others have ended before rank 0 closes
        self.meet()
        share.close()


def main(rank: int, size: int, folder: Path) -> None:
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [str(ROOT)]
    sys.modules["ltx2_engine"] = package

    import torch

    torch.set_num_threads(1)
    one = Rank(rank, size, folder)
    one.join()
    one.patch_reading()
    with torch.inference_mode():
        for name, case in cases_of(size).items():
            one.case(name, *case)
        if size > 1:
            one.failures()
    (folder / f"{size}-{rank}.json").write_text(json.dumps(one.results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
