"""The engine of one model on several devices: the same questions as ``LocalEngine``, answered by worker processes."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..components import adapters_of
from ..conditioning.latent import AVLatent
from ..host import HostOutOfMemory, host
from ..job import DecodedClip, SampleJob, check_latents, planned_passes
from ..model_files import ModelFiles
from ..model_spec import ModelSpec, rank_devices
from ..parallel.job_run import WorkerError
from ..parallel.messages import Message
from ..parallel.processes import Launch
from ..parallel.worker_group import WorkerGroup
from ..text.context import Context
from ..text.enhance import EnhanceRequest
from ..text.native import split_conditioning
from .codec import from_json
from .displays import Displays
from .handler import DEVICES, LOG_LEVEL
from .requests import FRAMES, pack

log = logging.getLogger("ltx2.engine")

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Answers = tuple[tuple[Message, ...], dict[str, Tensor]]

ENTRY = Path(__file__).resolve().parents[1] / "parallel" / "worker.py"


class Workers:
    """The workers of one model, which the host sees as a resident: what it asks back, all of them give."""

    def __init__(self, spec: ModelSpec) -> None:
        """Raises ValueError for more devices than there are. Starts nothing."""
        self.devices = rank_devices(spec.device, spec.ranks, host().compute_devices())
        self.label = f"{spec.ranks} workers of {spec.checkpoint.name}"
        level = logging.getLogger("ltx2").getEffectiveLevel()
        environment = {DEVICES: ",".join(self.devices), LOG_LEVEL: str(level)}
        # all of them together have the cores that this process would have
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // spec.ranks))
        self.group = WorkerGroup(Launch(spec.ranks, ENTRY, environment))
        self._held = [0] * spec.ranks

    def admit(self, weight_bytes: int) -> None:
        """Have the host make room for so many bytes on every GPU, as far as it can: workers plan with what there is."""
        for device in dict.fromkeys(self.devices):
            if device != "cpu":
                with contextlib.suppress(HostOutOfMemory):
                    host().admit(self, device, max(weight_bytes, self.bytes_on(device)), 0)

    def note_held(self, answers: tuple[Message, ...]) -> None:
        """What every worker says that it holds."""
        self._held = [int(answer.body.get("held", 0)) for answer in answers]

    def bytes_on(self, device: str) -> int:
        if not self.group.alive:
            return 0
        return sum(held for own, held in zip(self.devices, self._held, strict=True) if own == device)

    def release(self, device: str, wanted: int | None) -> int:
        """End the workers, unless they have a job: what one of them gives up, the others cannot use alone."""
        held = self.bytes_on(device)
        if not held or self.group.busy:
            return 0
        self.group.close()
        return held

    def close(self) -> None:
        self.group.close()
        host().retire(self)


class Fleet:
    """What engines of one model with any LoRAs share: workers, which start with the first job and end with ``close``, with
    the last of these engines, and with this process."""

    def __init__(self, spec: ModelSpec) -> None:
        self.workers = Workers(spec)
        # the host keeps residents alive
        weakref.finalize(self, self.workers.close)

    @property
    def generation(self) -> int:
        """Number of the workers that are there, or were there last."""
        return self.workers.group.generation

    def run(self, name: str, files: ModelFiles, arguments: Mapping[str, Any], out: Shapes) -> Answers:
        """Have all ranks do a job: their answers, and large results (``out``: dtypes and shapes) by name.

        Raises what the host raises when the user interrupts, ValueError for a job that the workers refuse, WorkersBusy while
        another job runs, and WorkerError with rank and stage for all else; the next job works again.
        """
        self.workers.admit(_transformer_bytes(files))
        request = pack(name, files.spec, arguments, out)
        segment = request.segment
        try:
            results = {key: segment.tensor(request.placed[key]) for key in out if segment is not None}
            with Displays() as displays:
                answers = self.workers.group.run(request, watch=host().check_interrupt, on_progress=displays.show)
        except WorkerError as error:
            if error.refused:
                raise ValueError(error.reason) from error
            raise
        finally:
            if segment is not None:
                segment.close()
        self.workers.note_held(answers)
        return answers, results


def _transformer_bytes(files: ModelFiles) -> int:
    """As they lie in the file, which is about what they take on a device."""
    return sum(tensor.size_bytes for file in files.of("transformer") for tensor in file.tensors.values())


_fleets: weakref.WeakValueDictionary[ModelSpec, Fleet] = weakref.WeakValueDictionary()
_opening = threading.Lock()


def _fleet_of(spec: ModelSpec) -> Fleet:
    """The workers of a model, those that are there if any engine still has them."""
    key = replace(spec.base, topology="auto")
    with _opening:
        fleet = _fleets.get(key)
        if fleet is None:
            fleet = _fleets[key] = Fleet(key)
        return fleet


class FleetEngine:
    """One model on several devices, with the interface of ``LocalEngine``."""

    def __init__(self, files: ModelFiles) -> None:
        """Raises LoraError for a LoRA that does not fit, ValueError for more devices than there are. Starts nothing."""
        self.files = files
        self.config = files.config
        _, self.lora_report = adapters_of(files)
        self._fleet = _fleet_of(files.spec)

    @property
    def generation(self) -> int:
        """Number of the workers that are there, or were there last; fresh ones read the weights again."""
        return self._fleet.generation

    def start(self) -> None:
        """Start the workers, which begin to read in the background."""
        self._run("start")

    def encode(self, prompt: str) -> Context:
        """Encode a prompt, on rank 0."""
        return self._value("encode", Context, prompt=prompt)

    def encode_native(self, conditioning: Any) -> Context:
        """Turn a native CONDITIONING into a context, on rank 0. Raises ConditioningError when it is of another model."""
        text = split_conditioning(conditioning, self.config.text)
        return self._value("encode_native", Context, parts=text.parts, mask=text.mask)

    def enhance(self, request: EnhanceRequest) -> str:
        """A fuller prompt, by rank 0 or by as many ranks as read the fewest bytes; as ``LocalEngine.enhance``."""
        return self._value("enhance", str, request=request)

    def sample(self, job: SampleJob) -> AVLatent:
        """Sample a clip on all ranks. Raises ValueError for a job that does not fit the model."""
        planned_passes(job, self.files)
        preview = host().wants_preview(self.config.video_vae.latent_channels)
        answers, _ = self._run("sample", job=job, preview=preview)
        digests = [str(answer.body.get("digest")) for answer in answers]
        if len(set(digests)) > 1:
            log.warning(
                "the ranks have not computed the same bits (%s); the clip is that of rank 0", ", ".join(digests)
            )
        return _value_of(answers[0], AVLatent)

    def upscale(self, latent: AVLatent, upsampler: Path) -> AVLatent:
        """Enlarge the video of a latent, on rank 0; as ``LocalEngine.upscale``."""
        return self._value("upscale", AVLatent, latent=latent, upsampler=upsampler)

    def decode(self, latent: AVLatent, tiling_choice: str) -> DecodedClip:
        """Decode a latent to frames and sound, a band of rows on each rank. Raises ValueError for one that was not sampled."""
        check_latents(latent, self.config)
        video, clip = latent.latents.video, latent.clip
        shapes: Shapes = {}
        if video is not None:
            shapes = {FRAMES: (torch.float32, (video.shape[0], clip.frames, clip.height, clip.width, 3))}
        answers, results = self._run("decode", shapes, latent=latent, tiling=tiling_choice)
        frames = results.get(FRAMES)
        return DecodedClip(
            None if frames is None else frames.flatten(0, 1),
            answers[-1].tensors.get("waveform"),
            self.config.vocoder.sample_rate,
            clip.fps,
        )

    def close(self) -> None:
        """Give all memory back, also that of engines that differ in LoRAs only; a later use starts fresh workers."""
        self._fleet.workers.close()

    def _value(self, name: str, kind: type[Any], **arguments: Any) -> Any:
        answers, _ = self._run(name, **arguments)
        return _value_of(answers[0], kind)

    def _run(self, name: str, out: Shapes | None = None, **arguments: Any) -> Answers:
        return self._fleet.run(name, self.files, arguments, out or {})


def _value_of(answer: Message, kind: type[Any]) -> Any:
    tensors = [answer.tensors[str(number)] for number in range(len(answer.tensors))]
    return from_json(answer.body.get("value"), tensors, kind)
