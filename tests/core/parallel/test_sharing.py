"""Ranks that read a network together hold the bits of one that reads it alone, and end together."""

import json
import random
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from ltx2_engine.ltx2_core.loading.checkpoint import read_header
from ltx2_engine.ltx2_core.loading.together import parts_of
from ltx2_engine.ltx2_core.loading.write import write_checkpoint
from ltx2_engine.ltx2_core.parallel import sharing
from ltx2_engine.ltx2_core.parallel.gates import Board
from ltx2_engine.ltx2_core.tiny import write_tiny_checkpoint
from ltx2_engine.ltx2_core.tiny_lora import write_tiny_lora
from ltx2_engine.ltx2_core.tiny_packed import write_tiny_packed
from safetensors.torch import load_file

from .sharing_rank import CASES, FORMATS, Rank, cases_of
from .together import run_together

SIZES = (1, 2, 4)
gguf = pytest.importorskip("gguf", reason="gguf is not installed")


def write_gguf(path, source):
    writer, kinds = gguf.GGUFWriter(str(path), "ltxv"), gguf.GGMLQuantizationType
    writer.add_string("config", read_header(source).metadata["config"])
    for name, tensor in load_file(source).items():
        if name.startswith("model.diffusion_model."):
            packed = name.endswith((".to_q.weight", ".net.2.weight")) and "transformer_blocks" in name
            kind = kinds.Q8_0 if packed else kinds.F32
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharing")
    root.chmod(0o700)
    write_tiny_checkpoint(root / "float.safetensors", "2.3")
    halves = {
        name: tensor if "table" in name else tensor.bfloat16()
        for name, tensor in load_file(root / "float.safetensors").items()
    }
    write_checkpoint(root / "bf16.safetensors", halves, read_header(root / "float.safetensors").metadata)
    for format in ("fp8", "fp8_cast", "nvfp4"):
        write_tiny_packed(root / f"{format}.safetensors", root / "bf16.safetensors", format)
    write_gguf(root / "q8_0.gguf", root / "bf16.safetensors")
    write_tiny_lora(root / "low.safetensors", root / "bf16.safetensors", rank=4, seed=1)
    write_tiny_lora(root / "full.safetensors", root / "bf16.safetensors", targets="all", kind="full", seed=2)
    return root


@pytest.fixture(scope="module")
def ranks(folder):
    """Number of ranks -> what each of them has written down. Processes of their own, on CPU, over Gloo."""
    script = Path(__file__).with_name("sharing_rank.py")
    run_together({f"rank {rank} of {size}": [script, rank, size, folder] for size in SIZES for rank in range(size)})
    return {size: [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)] for size in SIZES}


@pytest.fixture(params=SIZES[1:])
def size(request):
    return request.param


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in SIZES[1:] for name in cases_of(size)])
def test_every_rank_holds_what_one_rank_would(ranks, size, name):
    (one,) = ranks[1]
    for results in ranks[size]:
        for number in range(len(CASES[name][2])):
            for what in ("bits", "states", "kept", "plan", "expected", "counted"):
                assert results[f"{name}/{number}/{what}"] == one[f"{name}/{number}/{what}"], (number, what)


def test_cases_are_what_they_are_called(ranks):
    (one,) = ranks[1]
    assert len({json.dumps(one[f"{name}/0/bits"]) for name in CASES if ", " not in name}) == len(FORMATS)
    assert one["bf16, pair/0/kept"][1] > 10
    assert one["fp8, pair/0/kept"][1] > 10
    assert any("branches" in key for key in one["nvfp4, low rank/0/bits"])


@pytest.mark.parametrize("format", FORMATS)
def test_every_byte_is_read_by_one_rank(ranks, size, format, folder):
    (one,) = ranks[1]
    read = [results[f"{format}/0/read"] for results in ranks[size]]
    assert sum(read) == one[f"{format}/0/read"] == one[f"{format}/0/expected"]
    slots = Rank(0, 1, folder).store(format, None)._slots
    parts = parts_of({slot: (_block(slot), slot.source.weight.size_bytes) for slot in slots}, size)
    assert {part.owner for part in parts} == set(range(len(parts)))[:size] if len(parts) < size else set(range(size))
    assert read == [sum(part.size_bytes for part in parts if part.owner == rank) for rank in range(size)]
    assert max(read) - min(read) <= max(part.size_bytes for part in parts)


def _block(slot):
    """Something that is the same for the weights of a block."""
    first, number, *_ = (*slot.name.split("."), "")
    return _BLOCKS.setdefault(number, torch.nn.Identity()) if first == "blocks" else None


_BLOCKS = {}


@pytest.mark.parametrize("policy", ["pair", "pinned", "file"])
def test_what_is_merged_is_read_by_one_rank_too(ranks, size, policy):
    (one,) = ranks[1]
    for format in ("bf16", "fp8", "in fp8") if size == 2 else ("bf16",):
        # at first, and when another list is asked for
        for name in (f"{format}, {policy}/0", f"{format}, {policy}/3"):
            assert one[f"{name}/plan"] is not None
            assert sum(results[f"{name}/read"] for results in ranks[size]) == one[f"{name}/read"] > 0
            assert all(results[f"{name}/read"] < one[f"{name}/read"] for results in ranks[size])


def test_what_can_be_had_without_reading_is_not_shared(ranks):
    (one,) = ranks[1]
    assert one["bf16, pair/2/plan"] is None
    assert one["bf16, pair/2/read"] == 0
    assert one["bf16, file/2/plan"] is not None


def test_progress_counts_what_others_read(ranks, size):
    for results in ranks[size]:
        for name in cases_of(size):
            for number in range(len(CASES[name][2])):
                assert results[f"{name}/{number}/counted"] == results[f"{name}/{number}/expected"]


@pytest.mark.parametrize("end", ["cut", "stop", "leave", "change, pair", "change, file"])
def test_a_reading_that_ends_on_one_rank_ends_on_all(ranks, size, end):
    (one,) = ranks[1]
    first, acting, *others = ranks[size]
    reason = "CheckpointError: rank 1: .*bf16.safetensors: the file ends" if end == "cut" else "Interrupted"
    assert re.match(reason, acting[f"{end}/error"])
    for results in (first, *others):
        assert results[f"{end}/error"].startswith("Interrupted: ")
        assert "left" in results[f"{end}/error"] or "ended on all" in results[f"{end}/error"]
    for results in ranks[size]:
        assert results[f"{end}/complete"] == end.startswith("change")
        assert results[f"{end}/threads"] == []
        # read on by itself, and again together
        wanted = one[f"bf16, {end[8:]}/0/bits" if end.startswith("change") else "bf16/0/bits"]
        assert results[f"{end}/alone"] == results[f"{end}/again"] == wanted
        assert results[f"{end}/back"] == one["bf16/0/bits"]
        assert results[f"{end}/time"] - acting[f"{end}/began"] < 1.0


def test_ranks_leave_though_the_first_has_not_begun(ranks, size):
    first, *others = ranks[size]
    assert first["late/over"]
    for results in others:
        assert results["late/error"].startswith("Interrupted: ")


@pytest.mark.parametrize("size", [2, 3, 8])
def test_no_rank_waits_in_a_collective_whenever_another_leaves(tmp_path, monkeypatch, size):
    """Threads for ranks, and a broadcast that fails where not all of them come to the same one."""
    meeting, places = threading.Barrier(size), {}

    def broadcast(tensor, source):
        places[threading.get_ident()] = (int(tensor[0]), source)
        meeting.wait(timeout=10)
        same = len(set(places.values())) == 1
        meeting.wait(timeout=10)
        assert same

    monkeypatch.setattr(sharing, "broadcast", broadcast)
    monkeypatch.setattr(sharing, "_NAP_SECONDS", 0.0001)
    board, draw, outcomes = Board(tmp_path / "board", size), random.Random(size), {"all": 0, "some": 0, "none": 0}
    parts = 6
    for reading in range(1, 61):
        places.clear()
        leaves = {rank: draw.random() * 0.01 for rank in range(size) if draw.random() < 1 / size}
        shares = [sharing.Sharing(board, rank, reading, torch.device("cpu")) for rank in range(size)]

        def run(rank, share, leaves=leaves):
            ends = time.monotonic() + leaves.get(rank, 60)
            numbers = list(range(parts))
            random.Random(rank).shuffle(numbers)
            for number in numbers:
                if time.monotonic() > ends or share.over():
                    break
                time.sleep(0.0005)
                share.offer(number, number % size, [torch.full((1,), number, dtype=torch.uint8)])
            else:
                share.offer(parts, 0, ())
                while share.given() <= parts and not share.over() and time.monotonic() < ends:
                    share.wait(0.02)
            share.close()

        threads = [threading.Thread(target=run, args=(rank, share)) for rank, share in enumerate(shares)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        given = {share.given() for share in shares}
        assert [share._error for share in shares] == [None] * size
        # what was given, was given to all
        assert len(given) == 1
        outcomes["all" if given == {parts + 1} else "some" if given != {0} else "none"] += 1
        assert leaves or given == {parts + 1}
    assert min(outcomes["all"], outcomes["some"]) > 0, outcomes
