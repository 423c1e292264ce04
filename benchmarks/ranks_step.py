"""One rank of bench_ranks.py: evaluates the transformer with the others, and writes down how long it took and what came out.

python benchmarks/ranks_step.py FOLDER    (see ranks.py)
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.state import LatentState
from ltx2_engine.ltx2_core.config.model import ModelConfig
from ltx2_engine.ltx2_core.config.released import released_config
from ltx2_engine.ltx2_core.evaluate import grouped_evaluate
from ltx2_engine.ltx2_core.graphs import can_capture
from ltx2_engine.ltx2_core.parallel.collectives import connect
from ltx2_engine.ltx2_core.parallel.context import ParallelContext
from ltx2_engine.ltx2_core.parallel.exchange_choice import fastest_exchange
from ltx2_engine.ltx2_core.parallel.groups import PassGroups, Topology
from ltx2_engine.ltx2_core.parallel.topology import name
from ltx2_engine.ltx2_core.presets import DISTILLED_SIGMAS
from ltx2_engine.ltx2_core.sampling.choice import SamplerChoice
from ltx2_engine.ltx2_core.sampling.denoise import Denoiser, Evaluate
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.sampling.noise import SamplerNoise
from ltx2_engine.ltx2_core.sampling.samplers import SAMPLERS
from ltx2_engine.ltx2_core.tiny import tiny_config
from ltx2_engine.ltx2_core.transformer.model import Transformer
from own_model import PLAIN, SIGMA, drawing, random_prompt, random_states, random_transformer
from ranks import Rank, main_of_rank
from safetensors.torch import save_file
from shapes import Shape
from step_guided import preset
from step_profile import STEPS, profile
from step_quality import attention
from timing import allocated, clean
from torch import Tensor

log = logging.getLogger(__name__)

Seat = tuple[ParallelContext, PassGroups]


@dataclass(frozen=True)
class Job:
    """What all ranks do.

    cases: (shape, ways in which passes are divided); the empty list is a plain forward, else four guided passes are
    evaluated in each of these topologies. quality: the shape of a run of 8 steps. results: where rank 0 writes it.
    profile: where texts go that say what captured forwards of several ranks launch; "" for none.
    """

    cases: list[tuple[str, list[str]]]
    quality: str
    repeats: int
    tiny: bool
    results: str
    profile: str = ""


def work(rank: Rank, given: dict[str, Any]) -> dict[str, Any]:
    job = Job(**given)
    config = ModelConfig.from_config(tiny_config("2.3") if job.tiny else released_config("2.3"), 49, ())
    model = random_transformer(config, rank.device)
    weights = allocated(rank.device)
    found: dict[str, Any] = {}
    for shape, topologies in job.cases:
        guidance = preset("guided 2.3/2.5", (1 if job.tiny else 28,)) if topologies else PLAIN
        for topology in topologies_of(rank, topologies):
            seat = seat_of(rank, topology)
            case = Case(config, model, Shape.parse(shape), guidance, seat, rank.device)
            for graphed in (False, True) if can_capture(rank.device) else (False,):
                clean(rank.device)
                run = step(case, graphed=graphed)
                times = rank.times(run, job.repeats)
                key = " ".join((shape, name(topology) if topologies else "", "graphs" if graphed else "")).strip()
                found[key] = {"times": times, "peak": peak(rank) - weights, "digest": digest(run())}
                log.info("%s: %.1f ms", key, median(times))
                if graphed and job.profile and rank.size > 1 and not topologies:
                    found[key] |= launches(key, run, rank, job)
                # with the memory of its graphs
                del run
    return {"steps": found, "quality": quality(config, model, rank, job)}


def seat_of(rank: Rank, topology: Topology) -> Seat:
    """As an engine's ranks meet."""
    parallel, groups = connect(rank.rank, topology)
    return fastest_exchange(parallel, rank.device), groups


def launches(key: str, run: Any, rank: Rank, job: Job) -> dict[str, int]:
    """How often ranks meet in one evaluation, by NCCL's kernels and by ours, also as a text with all kernels."""
    name = f"ranks_profile_{rank.size}_{key.replace(' ', '_')}.txt"
    times = profile(f"{key}, {rank.size} ranks", run, rank.device, Path(job.profile) / name if rank.rank == 0 else None)

    def count(part: str) -> int:
        return sum(len(each) for name, each in times.items() if part in name) // STEPS

    return {"nccl": count("nccl"), "meetings": count("meet_kernel")}


def topologies_of(rank: Rank, names: list[str]) -> Iterator[Topology]:
    """Those of so many ranks; all of them in one group where none is named."""
    named = [Topology(*map(int, one.split("x"))) for one in names] or [Topology(1, rank.size)]
    fitting = [one for one in named if one.groups * one.ulysses == rank.size]
    yield from fitting or [Topology(1, rank.size)]


@dataclass(frozen=True)
class Case:
    """What is evaluated: all passes of the guidance, at a shape, by this rank's part of them."""

    config: ModelConfig
    model: Transformer
    shape: Shape
    guidance: StreamGuidance
    seat: Seat
    device: torch.device

    def states(self) -> AV[LatentState]:
        return random_states(self.config, self.shape.clip, drawing(self.device))


def step(case: Case, *, graphed: bool) -> Callable[[], list[Tensor]]:
    """One evaluation of all passes; gives every velocity."""
    evaluate, x = evaluation(case, graphed=graphed)
    return lambda: [part for velocity in evaluate(x, SIGMA, AV(True, True)) for part in velocity.present()]


def evaluation(case: Case, *, graphed: bool) -> tuple[Evaluate, AV[Tensor]]:
    """The function of a run, and where it begins."""
    states, prompt = case.states(), random_prompt(case.config, drawing(case.device))
    passes = plan_passes(AV(case.guidance, case.guidance))
    both = prompt, prompt.map(torch.neg)
    context, groups = case.seat
    evaluate = grouped_evaluate(
        case.model, states, passes, *both, lambda: None, graphed=graphed, parallel=context, groups=groups
    )
    return evaluate, states.map(lambda state: state.latent)


def quality(config: ModelConfig, model: Transformer, rank: Rank, job: Job) -> dict[str, str]:
    """Latents of 8 steps by all ranks, twice, and on one rank with two implementations of attention too; where they are."""
    seat = seat_of(rank, Topology(1, rank.size))
    case = Case(config, model, Shape.parse(job.quality), PLAIN, seat, rank.device)
    runs = {"cudnn": None, "cudnn again": None} | ({"flash": "flash"} if rank.size == 1 else {})
    digests = {}
    for what, implementation in runs.items():
        with attention(implementation or "cudnn"):
            latents = sampled(case)
        digests[what] = digest(list(latents.present()))
        if rank.rank == 0:
            parts = dict(zip(("video", "sound"), latents.present(), strict=True))
            save_file({key: part.float().cpu().contiguous() for key, part in parts.items()}, path_of(job, rank, what))
    return digests


def path_of(job: Job, rank: Rank, what: str) -> Path:
    return Path(job.results) / f"{rank.size} {what}.safetensors"


def sampled(case: Case) -> AV[Tensor]:
    evaluate, x = evaluation(case, graphed=False)
    guidance = AV(case.guidance, case.guidance)
    choice = SamplerChoice("euler")
    denoise = Denoiser(evaluate, case.states(), plan_passes(guidance), guidance)
    noise = SamplerNoise(choice, 0, case.device)
    return SAMPLERS[choice.name](denoise, x, DISTILLED_SIGMAS, noise, choice, lambda *_: None)


def digest(parts: list[Tensor]) -> str:
    """Of the bits of tensors; "not finite" where one is not, "constant" where all its values are one."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if not bool(part.isfinite().all()):
            return "not finite"
        if float(part.float().std()) == 0:
            return "constant"
        found.update(part.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def peak(rank: Rank) -> int:
    return torch.cuda.max_memory_allocated(rank.device) if rank.device.type == "cuda" else 0


if __name__ == "__main__":
    # which way ranks exchange, graphs
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main_of_rank(work)
