"""One rank of test_peer_copies.py: exchanges by copy engines and through NCCL, and writes what was the same.

python peer_rank.py RANK SIZE FOLDER
"""

import json
import os
import sys
import types
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RANK, SIZE, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
PLACES = ("queries", "keys", "values")
ROUNDS = 20


def main() -> None:
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [str(ROOT)]
    sys.modules["ltx2_engine"] = package

    from ltx2_engine.ltx2_core.parallel.worker_environment import worker_environment

    # before PyTorch reads it
    os.environ.update(worker_environment({}, {}, RANK, SIZE, FOLDER))

    import torch
    from ltx2_engine.ltx2_core.parallel.collectives import GroupCollectives, join, leave
    from ltx2_engine.ltx2_core.parallel.context import ParallelContext
    from ltx2_engine.ltx2_core.parallel.exchange_choice import fastest_exchange
    from ltx2_engine.ltx2_core.parallel.peer_copies import PeerCopies

    if torch.cuda.device_count() < SIZE:
        # NCCL takes ranks of one GPU for ranks of several hosts, which is how it lets them be
        os.environ["NCCL_HOSTID"] = str(RANK)
    device = torch.device("cuda", RANK % torch.cuda.device_count())
    torch.cuda.set_device(device)
    join(RANK, SIZE, FOLDER / "store", backend="nccl", timeout=timedelta(seconds=60), device=device)
    plain = ParallelContext(RANK, SIZE, GroupCollectives())
    copied = replace(plain, copies=PeerCopies(RANK, plain.exchange, device))
    with torch.inference_mode():
        found = {}
        for how in ("rows", "packed"):
            copied.copies.packs = how == "packed"
            same_bits = exchanges(plain, copied, device) | evaluations(plain, copied, device)
            found |= {f"{how}: {name}": value for name, value in same_bits.items()}
        found["what is chosen is right"] = same(plain, fastest_exchange(plain, device), 300, torch.bfloat16, device)
        copied.copies.close()
        found["memory"] = memory(plain, device)
    (FOLDER / f"{RANK}.json").write_text(json.dumps(found), encoding="utf-8")
    leave()


def memory(plain, device):
    """Bytes that places take from the GPU, and bytes that are missing when they have been closed."""
    import torch
    from ltx2_engine.ltx2_core.parallel.context import Split
    from ltx2_engine.ltx2_core.parallel.peer_copies import PeerCopies

    def free():
        torch.cuda.synchronize(device)
        # places are made where PyTorch has given back what it keeps
        torch.cuda.empty_cache()
        plain.agree(True, device)
        found = torch.cuda.mem_get_info(device)[0]
        # nobody goes on before all have looked: two ranks may share one GPU
        plain.agree(True, device)
        return found

    before = free()
    copies = PeerCopies(RANK, plain.exchange, device)
    split = Split(plain, 60_000)
    x = torch.empty(1, split.share, 4096, dtype=torch.bfloat16, device="meta")
    assert copies.carries(x, split)
    taken = before - free()
    copies.close()
    return {"taken": taken, "missing": before - free(), "expected": 4 * x.nbytes}


def exchanges(plain, copied, device):
    import torch

    counts = {"even": 256 * SIZE, "uneven": 256 * SIZE - 3, "fewer tokens than ranks": 1, "larger": 40_000}
    return {
        f"{name}, {dtype}": same(plain, copied, count, dtype, device)
        for name, count in counts.items()
        for dtype in (torch.bfloat16, torch.float32)
    }


def same(plain, copied, count, dtype, device):
    """Whether both ways bring the same bits, round after round, of tensors of which one lies among others."""
    import torch
    from ltx2_engine.ltx2_core.parallel.context import Split

    usual, ours = Split(plain, count), Split(copied, count)
    draw = torch.Generator(device).manual_seed(RANK)
    for _ in range(ROUNDS):
        fused = torch.randn(1, usual.share, 3, 256 * SIZE, generator=draw, device=device).to(dtype)
        q, k = fused[:, :, 0].contiguous(), fused[:, :, 1].contiguous()
        v = fused[:, :, 2]
        going = ours.ahead("values", v)
        got = ours.to_heads(ours.ahead("queries", q), ours.ahead("keys", k), going)
        wanted = usual.to_heads(q, k, v)
        if not all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)):
            return False
        back = ours.to_tokens(got[0] + got[1])
        if not torch.equal(back, usual.to_tokens(wanted[0] + wanted[1])):
            return False
    return True


def evaluations(plain, copied, device):
    """Whether four guided passes of a tiny model have the same bits, launch by launch and as graphs that hold exchanges."""
    import cases
    import torch
    from ltx2_engine.ltx2_core.evaluate import split_evaluate

    model = cases.model_of("2.3", torch.bfloat16).to(device)
    found = {}
    for name, case in {"even": cases.Case(), "uneven": cases.CASES["uneven"]}.items():
        states, prompts, x = cases.setting(case, model.config, torch.bfloat16)
        states = states.map(lambda state: moved(state, device))
        prompts = [prompt.map(lambda text: text.to(device)) for prompt in prompts]
        x = x.map(lambda tokens: tokens.to(device))
        results = {}
        for how, context in {"nccl": plain, "copies": copied}.items():
            for graphed in (False, True):
                run = split_evaluate(
                    model, states, cases.ALL_PASSES, *prompts, lambda: None, graphed=graphed, parallel=context
                )
                rounds = []
                for number in range(5):
                    noisy = x.map(lambda tokens, number=number: tokens * (1 + number))
                    velocities = run(noisy, 0.7 - 0.1 * number, case.enabled)
                    rounds += [part.clone() for velocity in velocities for part in velocity.present()]
                results[how, graphed] = rounds
        wanted = results.pop(("nccl", False))
        for (how, graphed), rounds in results.items():
            label = f"a guided step, {name}, {how}{', graphs' if graphed else ''}"
            found[label] = all(
                torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(rounds, wanted, strict=True)
            )
    return found


def moved(state, device):
    """A dataclass with its tensors on the device."""
    import torch

    tensors = {key: value.to(device) for key, value in vars(state).items() if isinstance(value, torch.Tensor)}
    return replace(state, **tensors)


if __name__ == "__main__":
    main()
