"""One rank of bench_enhance.py: reads a prompt and draws tokens in every topology of so many ranks.

python benchmarks/ranks_enhance.py FOLDER    (see ranks.py)
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import pack  # noqa: F401
import torch
from ltx2_engine.ltx2_core.enhancing_over_ranks import twin
from ltx2_engine.ltx2_core.parallel.helix_collectives import connect
from ltx2_engine.ltx2_core.parallel.helix_topology import ONE, Decoder, Ranks, Topology, topologies
from ltx2_engine.ltx2_core.parallel.helix_traffic import traffic
from ltx2_engine.ltx2_core.text import gemma
from ltx2_engine.ltx2_core.text.draw import Draw, Randomness
from ltx2_engine.ltx2_core.text.enhance import writer
from random_model import GEMMA_12B, STD
from ranks import Rank, main_of_rank
from report import Row
from timing import settle
from torch import Tensor

# transformers' own attention on one GPU, for comparison
PLAIN = "one GPU, transformers' attention"
_PIECE = 4096
_FORCED = 4
_WARM = 3
_LEAST_COSINE = 0.99
_TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
}


@dataclass(frozen=True)
class Plan:
    """What is measured: layers of the model, positions of each prompt, tokens that are timed."""

    layers: int
    lengths: tuple[int, ...]
    tokens: int
    tiny: bool = False

    @property
    def config(self) -> dict[str, Any]:
        sizes = {**GEMMA_12B, **(_TINY if self.tiny else {}), "num_hidden_layers": self.layers}
        return {"model_type": "gemma3_text", **sizes}


def decoder_of(plan: Plan) -> Decoder:
    with torch.device("meta"):
        return Decoder.of(gemma.build_gemma(plan.config).config)


def topologies_of(plan: Plan, ranks: int) -> list[Topology]:
    return topologies(decoder_of(plan), ranks)


# one rank -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """first: seconds until the prompt was read. tokens: seconds of each token behind it."""

    first: float
    tokens: list[float]


def random_gemma(plan: Plan, device: torch.device, dtype: torch.dtype) -> Any:
    """The same weights on every rank."""
    with torch.device("meta"):
        text = gemma.build_gemma(plan.config)
    text = text.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in text.parameters():
        # larger in tiny models, whose layers would do nothing
        parameter.normal_(0, 0.1 if plan.tiny else STD, generator=generator)
    gemma.fill_buffers(text, device)
    return text


def read(model: Any, cache: Any, prompt: Tensor) -> Tensor:
    """Read a prompt [1, L] in pieces. Returns the scores [1, V] of what follows."""
    for piece in prompt.split(_PIECE, dim=1):
        scores = model(input_ids=piece, past_key_values=cache, logits_to_keep=1).logits
    return scores[:, -1]


def generate(model: Any, cache: Any, prompt: Tensor, plan: Plan) -> Measured:
    """Read a prompt and draw tokens, each of which the host sees, as it has to for the end of an answer."""
    device = prompt.device
    draw = Draw(Randomness(), 0, size=plan.config["vocab_size"])
    settle(device)
    marks = [time.perf_counter()]
    scores = read(model, cache, prompt)
    for _ in range(plan.tokens + _WARM):
        token = draw(prompt, scores).argmax(-1, keepdim=True)
        token.tolist()
        marks.append(time.perf_counter())
        scores = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    times = [after - before for before, after in pairwise(marks)]
    return Measured(times[0], times[1 + _WARM :])


def forced(model: Any, cache: Any, prompt: Tensor, following: Tensor) -> Tensor:
    """Scores [F, V] of tokens that are forced after a prompt."""
    scores = [read(model, cache, prompt)]
    for token in following.split(1, dim=1):
        scores.append(model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1])
    return torch.cat(scores).float()


class Bench:
    """The model of this rank, what its prompts are, and the scores that all topologies have to give."""

    def __init__(self, plan: Plan, rank: Rank) -> None:
        self.plan, self.rank, self.device = plan, rank, rank.device
        self.text = random_gemma(plan, self.device, torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.decoder = Decoder.of(self.text.config)
        self.rows: list[Row] = []
        self.want = forced(writer(self.text), self.plain_cache(), *self.check_prompt())

    def plain_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.text.config)

    def prompt(self, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        # no padding, whose embedding is empty
        return torch.randint(3, self.plan.config["vocab_size"], (1, length), generator=generator).to(self.device)

    def check_prompt(self) -> tuple[Tensor, Tensor]:
        ids = self.prompt(min(self.plan.lengths[0], _PIECE) + _FORCED)
        return ids[:, :-_FORCED], ids[:, -_FORCED:]

    def plain(self) -> None:
        model = writer(self.text)
        for length in self.plan.lengths:
            self.add(PLAIN, length, generate(model, self.plain_cache(), self.prompt(length), self.plan), Topology())

    def shared(self, ranks: Ranks) -> None:
        from ltx2_engine.ltx2_core.parallel.helix_gemma import share_model

        model = writer(twin(self.text))
        shared = share_model(model, ranks, copies=False)
        name = ranks.topology.name
        try:
            found = forced(model, shared.new_cache(), *self.check_prompt())
            cosine = torch.cosine_similarity(found, self.want).min().item()
            if not cosine >= _LEAST_COSINE:
                raise SystemExit(f"{name}: scores differ from transformers' own, cosine {cosine}")
            self.rows.append(Row(f"{name}: scores, cosine to transformers", cosine, "1", f">= {_LEAST_COSINE}"))
            for length in self.plan.lengths:
                measured = generate(model, shared.new_cache(), self.prompt(length), self.plan)
                self.add(name, length, measured, ranks.topology)
        finally:
            shared.forget()

    def add(self, name: str, length: int, measured: Measured, topology: Topology) -> None:
        first, *tokens = self.rank.slowest([measured.first, *measured.tokens])
        count, what = traffic(self.decoder, topology, length), f"{name} at {length:,} positions"
        self.rows += [
            Row(f"{what}: speed", 1 / median(tokens), "tokens/s"),
            Row(f"{what}: until the prompt is read", first, "s"),
            Row(f"{what}: read a token, counted", count.read / 1e9, "GB"),
            Row(f"{what}: read a second, by that count", count.read / 1e9 / median(tokens), "GB/s"),
            Row(f"{what}: sent a token, counted", count.sent / 1e6, "MB"),
        ]


@torch.inference_mode()
def work(rank: Rank, given: dict[str, Any]) -> dict[str, Any]:
    bench = Bench(Plan(**{**given, "lengths": tuple(given["lengths"])}), rank)
    if rank.size == 1:
        bench.plain()
    for topology in topologies(bench.decoder, rank.size):
        ranks = ONE if rank.size == 1 else connect(topology)
        assert ranks is not None
        bench.shared(ranks)
    return {"rows": [asdict(row) for row in bench.rows]}


if __name__ == "__main__":
    main_of_rank(work)
