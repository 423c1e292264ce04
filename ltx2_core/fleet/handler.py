"""What a worker of a fleet does: it holds an engine for its own device, and does each job with the other ranks."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..av import AV
from ..conditioning.latent import AVLatent
from ..engine import LocalEngine
from ..host import PreviewSpec, use_host
from ..job import SampleJob
from ..model_spec import ModelSpec
from ..parallel.worker_process import Job, Result, Seat
from ..preflight import open_files
from ..text.enhance import EnhanceRequest
from ..text.native import NativeText
from .codec import to_json
from .requests import FRAMES, unpack
from .team import Team
from .worker_host import WorkerHost

T = TypeVar("T")

# the devices of all ranks, and the level of the parent's log
DEVICES, LOG_LEVEL = "LTX2_RANK_DEVICES", "LTX2_LOG_LEVEL"
# lists of LoRAs whose headers are kept
_KEPT_ENGINES = 8


class EngineJobs:
    """The ``Handler`` of a fleet's workers."""

    def __init__(self, seat: Seat) -> None:
        """Returns when all ranks are there."""
        self._device = os.environ[DEVICES].split(",")[seat.rank]
        _log_as(seat.rank)
        device = torch.device(self._device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._host = WorkerHost(seat.rank, self._device)
        self._team = Team(seat, device, self._host)
        self._engines: dict[ModelSpec, LocalEngine] = {}

    def run(self, job: Job) -> Result:
        request = unpack(job.request)
        job.enter_stage(request.name)
        preview = request.arguments.get("preview")
        try:
            with self._host.running(job, preview), use_host(self._host), torch.inference_mode():
                spec = request.spec.of_rank(self._device)
                engine = self._team.agree(lambda: self._engine(spec))
                do: Callable[..., Result] = getattr(self, f"_{request.name}")
                result = do(engine, out=request.out, **request.arguments)
                return replace(result, body={**result.body, "held": engine.device_bytes()})
        except BaseException as error:
            job.agreed = error is self._team.agreed_error
            raise
        finally:
            self._team.forget()

    def close(self) -> None:
        self._engines.clear()
        self._team.close()

    # the jobs ---------------------------------------------------------------------------------------------------------

    def _start(self, engine: LocalEngine, out: Mapping[str, Tensor]) -> Result:
        self._team.agree(partial(engine.start, together=True))
        return Result()

    def _encode(self, engine: LocalEngine, out: Mapping[str, Tensor], prompt: str) -> Result:
        # rank 0 would begin to read alone what all are going to need
        self._start(engine, out)
        return self._on_rank_0(lambda: engine.encode(prompt))

    def _enhance(self, engine: LocalEngine, out: Mapping[str, Tensor], request: EnhanceRequest) -> Result:
        from ..enhancing_over_ranks import enhance_prompt_over_ranks, topology_for

        topology = topology_for(engine.files.text_encoder, self._team.size, request)
        if topology.size == 1:
            return self._on_rank_0(lambda: engine.enhance(request))
        self._team.agree(engine.wait_for_shared)
        ranks = self._team.writers(topology)

        def write() -> str | None:
            return None if ranks is None else engine.enhance(request, partial(enhance_prompt_over_ranks, ranks=ranks))

        # the room for the encoder is what one rank alone may lack
        self._team.agree(lambda: None if ranks is None else engine.hold_text_encoder())
        text = self._team.agree(write)
        return _value(text) if self._team.rank == 0 else Result()

    def _encode_native(
        self, engine: LocalEngine, out: Mapping[str, Tensor], parts: AV[Tensor], mask: Tensor | None
    ) -> Result:
        return self._on_rank_0(lambda: engine.connect_native(NativeText(parts, mask is not None, mask)))

    def _sample(
        self, engine: LocalEngine, out: Mapping[str, Tensor], job: SampleJob, preview: PreviewSpec | None
    ) -> Result:
        latent = engine.sample(job)
        result = _value(latent) if self._team.rank == 0 else Result()
        return replace(result, body={**result.body, "digest": _digest(latent)})

    def _upscale(self, engine: LocalEngine, out: Mapping[str, Tensor], latent: AVLatent, upsampler: Path) -> Result:
        return self._on_rank_0(lambda: engine.upscale(latent, upsampler))

    def _decode(self, engine: LocalEngine, out: Mapping[str, Tensor], latent: AVLatent, tiling: str) -> Result:
        self._team.agree(engine.wait_for_shared)
        clip = engine.decode(latent, tiling, out.get(FRAMES))
        return Result(tensors={} if clip.waveform is None else {"waveform": clip.waveform})

    def _on_rank_0(self, work: Callable[[], Any]) -> Result:
        value = self._only_rank_0(work)
        return Result() if value is None else _value(value)

    def _only_rank_0(self, work: Callable[[], T]) -> T | None:
        """What rank 0 gets; the others wait to hear how it went there."""
        return self._team.agree(lambda: work() if self._team.rank == 0 else None)

    # the engine -------------------------------------------------------------------------------------------------------

    def _engine(self, spec: ModelSpec) -> LocalEngine:
        """The engine of a list of LoRAs; all of a fleet share one set of networks."""
        self._host.check_interrupt()
        engine = self._engines.get(spec)
        if engine is None:
            base = self._base(spec)
            engine = base if spec == base.files.spec else LocalEngine(replace(base.files, spec=spec), base)
            while len(self._engines) >= _KEPT_ENGINES:
                # the first is the base of all
                del self._engines[list(self._engines)[1]]
            self._engines[spec] = engine
            if engine is not base:
                engine.expect_loras()
        return engine

    def _base(self, spec: ModelSpec) -> LocalEngine:
        base = next(iter(self._engines.values()), None)
        if base is None:
            base = LocalEngine(open_files(spec.base), ranks=self._team)
            self._engines[spec.base] = base
        return base


def _value(value: Any) -> Result:
    tensors: list[Tensor] = []
    body = {"value": to_json(value, tensors)}
    return Result(body, {str(number): tensor for number, tensor in enumerate(tensors)})


def _digest(latent: AVLatent) -> str:
    """Of the bits of a latent, by which the parent sees that all ranks have made the same."""
    found = hashlib.blake2b(digest_size=16)
    for part in latent.latents.present():
        found.update(part.contiguous().numpy().tobytes())
    return found.hexdigest()


def _log_as(rank: int) -> None:
    """Rank 0 logs as the parent does, the others what nobody else can know."""
    level = int(os.environ.get(LOG_LEVEL, logging.WARNING))
    logging.basicConfig(format=f"rank {rank}: %(message)s")
    logging.getLogger("ltx2").setLevel(level if rank == 0 else max(level, logging.ERROR))
