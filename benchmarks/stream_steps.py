"""Steps of a model on the device, of the same model streamed, and of one with low-rank branches."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.component import _spread
from ltx2_engine.ltx2_core.loading.arena import Arena
from ltx2_engine.ltx2_core.loading.linear import LowRank, PackedLinear, put
from ltx2_engine.ltx2_core.memory_plan import SLOTS
from ltx2_engine.ltx2_core.networks import build_on_meta
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.streaming import BlockStream
from ltx2_engine.ltx2_core.transformer.model import Transformer
from own_model import DTYPE, PLAIN, random_transformer, step_of
from random_model import STD
from report import Row
from stream_setting import Setting, named, same_bits
from timing import mark, milliseconds, settle
from torch import Tensor, nn

RANK = 384


def steps(setting: Setting) -> Iterator[Row]:
    """Resident and streamed steps of one model."""
    resident = random_transformer(setting.model, setting.device)
    hosted = HostedBlocks(setting, resident)
    yield Row("blocks to host memory", hosted.seconds, "s")
    try:
        chosen = sorted(_spread(hosted.fewest_streamed(setting, resident), len(resident.blocks)))
        with hosted.streamed(setting, resident, chosen) as model:
            yield from compared(setting, resident, model, setting.large, PLAIN, "<= 1.05")
            yield from compared(setting, resident, model, setting.large, setting.guided, "<= 1.03", warm=1)
        yield from against_link(setting, resident, hosted, chosen)
    finally:
        hosted.close()
    yield from branches(setting, resident)


def twin(model: nn.Module) -> Any:
    """Another module with the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


class HostedBlocks:
    """The blocks of a model once more, in host memory."""

    def __init__(self, setting: Setting, model: Transformer):
        start = time.perf_counter()
        self.blocks = build_on_meta("transformer", setting.model).to(DTYPE).blocks
        self.arenas = [Arena.of(block) for block in self.blocks]
        for ours, theirs in zip(self.blocks.parameters(), model.blocks.parameters(), strict=True):
            ours.copy_(theirs)
        self.seconds = time.perf_counter() - start

    def fewest_streamed(self, setting: Setting, model: Transformer) -> int:
        """How many blocks have to be streamed for weights and slots to fit the setting's budget."""
        block = self.arenas[0].size_bytes
        outside = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in model.blocks.parameters())
        resident = (setting.budget - outside) // block - SLOTS
        return len(self.blocks) - max(resident, 1)

    def streamed(self, setting: Setting, resident: Transformer, chosen: Collection[int]) -> Streamed:
        """The model with these of its blocks streamed."""
        model = twin(resident)
        for number in chosen:
            model.blocks[number] = self.blocks[number]
        return Streamed(model, BlockStream([self.blocks[number] for number in chosen], device=setting.device))

    def copy_once(self, setting: Setting, chosen: Collection[int]) -> float:
        """Milliseconds of copying these blocks to the device, with nothing beside it."""
        buffer = torch.empty_like(self.arenas[0].memory, device=setting.device)

        def run() -> None:
            for number in chosen:
                buffer.copy_(self.arenas[number].memory, non_blocking=True)

        (time_each,), _ = take_turns(setting, [run], warm=1)
        return time_each

    def close(self) -> None:
        for arena in self.arenas:
            arena.close()


@dataclass(frozen=True)
class Streamed:
    """A model with a stream, which ends with the block."""

    model: Transformer
    stream: BlockStream

    def __enter__(self) -> Transformer:
        return self.model

    def __exit__(self, *exc: object) -> None:
        self.stream.close()


def compared(
    setting: Setting,
    resident: Transformer,
    model: Transformer,
    clip: ClipShape,
    guidance: StreamGuidance,
    bar: str,
    warm: int | None = None,
) -> Iterator[Row]:
    passes = len(plan_passes(AV(guidance)))
    what = f"{named(clip)}, {passes} pass{'es' if passes > 1 else ''}"
    runs = [step_of(setting.model, one, clip, setting.random, guidance) for one in (resident, model)]
    (alone, streamed), given = take_turns(setting, runs, warm=warm)
    yield Row(f"{what}: step, resident", alone, "ms")
    yield Row(f"{what}: step, streamed", streamed, "ms")
    yield Row(f"{what}: streamed / resident", streamed / alone, "1", bar)
    yield same_bits(what, given)


def against_link(
    setting: Setting, resident: Transformer, hosted: HostedBlocks, chosen: Collection[int]
) -> Iterator[Row]:
    """Steps that are shorter than the copies: how near they come to the longer of both."""
    clip, total = setting.small, len(resident.blocks)
    size = sum(hosted.arenas[number].size_bytes for number in chosen)
    copies = hosted.copy_once(setting, chosen)
    plain = step_of(setting.model, resident, clip, setting.random)
    with hosted.streamed(setting, resident, chosen) as model:
        (alone, streamed), given = take_turns(setting, [plain, step_of(setting.model, model, clip, setting.random)])
    what = named(clip)
    yield Row(f"{what}: streamed blocks", len(chosen), f"of {total}")
    yield Row(f"{what}: copied in a step", size / 1e9, "GB")
    yield Row("pinned host to device", size / copies / 1e6, "GB/s")
    yield Row(f"{what}: copies alone", copies, "ms")
    yield Row(f"{what}: step, resident", alone, "ms")
    yield Row(f"{what}: step, streamed", streamed, "ms")
    yield Row(f"{what}: streamed / max(copies, resident)", streamed / max(copies, alone), "1", "<= 1.15")
    yield same_bits(what, given)
    for how, numbers in (
        ("as many blocks, the last", range(total - len(chosen), total)),
        ("every block", range(total)),
    ):
        with hosted.streamed(setting, resident, numbers) as model:
            (streamed,), given = take_turns(setting, [step_of(setting.model, model, clip, setting.random)])
        floor = max(copies * len(numbers) / len(chosen), alone)
        yield Row(f"{what}: step, streamed, {how}", streamed, "ms")
        yield Row(f"{what}: streamed / max(copies, resident), {how}", streamed / floor, "1")
        yield same_bits(f"{what}, {how}", [[plain()], *given])


def branches(setting: Setting, resident: Transformer) -> Iterator[Row]:
    """What low-rank branches beside every linear layer of the blocks cost, against a LoRA in the weights."""
    beside, numbers = twin(resident), count()
    for block in beside.blocks:
        for name, linear in [(name, part) for name, part in block.named_modules() if isinstance(part, nn.Linear)]:
            put(block, name, with_branch(setting, linear, next(numbers)))
    runs = [step_of(setting.model, model, setting.large, setting.random) for model in (resident, beside)]
    (merged, slower), (_, outputs) = take_turns(setting, runs, warm=1)
    assert all(part.isfinite().all() for part in outputs[0])
    what = f"{named(setting.large)}, LoRA of rank {RANK}"
    yield Row(f"{what}: step, merged", merged, "ms")
    yield Row(f"{what}: step, in branches", slower, "ms")
    yield Row(f"{what}: in branches / merged", slower / merged, "1")


def with_branch(setting: Setting, linear: nn.Linear, seed: int) -> PackedLinear:
    generator = torch.Generator(setting.device).manual_seed(seed)

    def factor(*shape: int) -> Tensor:
        return torch.empty(*shape, device=setting.device, dtype=DTYPE).normal_(0, STD, generator=generator)

    branch = LowRank(factor(RANK, linear.in_features), factor(linear.out_features, RANK), 1.0)
    branch.strength = 1.0
    packed = PackedLinear(linear.weight, None, linear.bias)
    packed.branches = nn.ModuleList([branch])
    return packed


# timing ---------------------------------------------------------------------------------------------------------------


def take_turns(
    setting: Setting, runs: Sequence[Callable[[], Any]], *, warm: int | None = None
) -> tuple[list[float], list[list[Any]]]:
    """Median milliseconds of each run, and all that each gave; the host waits for the device at the end only."""
    warm = setting.warm if warm is None else warm
    marks: list[list[tuple[Any, Any]]] = [[] for _ in runs]
    given: list[list[Any]] = [[] for _ in runs]
    for _ in range(warm + setting.rounds):
        for index, run in enumerate(runs):
            before = mark(setting.device)
            given[index].append(run())
            marks[index].append((before, mark(setting.device)))
    settle(setting.device)
    return [median(milliseconds(*pair) for pair in pairs[warm:]) for pairs in marks], given
