"""Decoding the sound of a clip, on a GPU beside the picture.

Its many small kernels leave a GPU idle and the picture's few large ones leave the host idle. So the host asks for the
sound when the device has a piece of the picture to work on. One thread does both: cuDNN's plans belong to a thread, and
in a new one all of the sound's would be made again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .component import Component
from .host import host

WORK_BYTES = 1 << 30


class SoundDecoding:
    """Latents [B, C, T, mel bins / 4] on their way to a waveform [B, 2, N] float32 on the CPU.

    ``prepare`` and ``beside`` have it decoded while the device decodes pieces of video, where there is room for both;
    ``result`` has it decoded otherwise.
    """

    def __init__(self, latents: Tensor, decoder: Component[Any], vocoder: Component[Any]):
        self._latents, self._decoder, self._vocoder = latents, decoder, vocoder
        self._device = torch.device(decoder.device)
        self._prepared: tuple[Any, Any] | None = None
        self._ready: torch.cuda.Event | None = None
        self._waveform: Tensor | None = None

    def prepare(self, free_bytes: int | None, others_bytes: int) -> int:
        """Place the networks if they and the work fit beside what others need; returns the bytes of work to leave free.

        Others place theirs between this and ``beside``: making room for one network may take the memory of another.
        """
        missing = self._decoder.missing_bytes + self._vocoder.missing_bytes
        if not self._runs_beside() or free_bytes is None or free_bytes < missing + WORK_BYTES + others_bytes:
            return 0
        self._prepared = self._networks()
        if self._device.type == "cuda":
            self._ready = torch.cuda.current_stream(self._device).record_event()
        return WORK_BYTES

    def beside(self, pieces: Iterable[Tensor], check: Callable[[], None] | None = None) -> Iterator[Tensor]:
        """The pieces; when the device has been asked for the first, it is asked for the sound too.

        Not if the sound was not prepared, or if its networks' memory was taken since. Raises what decoding raises, and
        what ``check`` raises, by default the user's interrupt.
        """
        for piece in pieces:
            prepared, self._prepared = self._prepared, None
            if prepared is not None and not self._decoder.missing_bytes and not self._vocoder.missing_bytes:
                with _side_stream(self._device, self._ready):
                    self._waveform = self._decode(*prepared, check)
            del prepared
            yield piece
            del piece

    def result(self) -> Tensor:
        """The waveform. Raises what decoding raises, and what the user's interrupt raises."""
        with host().progress(1, "decoding sound") as progress:
            if self._waveform is None:
                waveform = self._decode(*self._networks()).cpu()
            else:
                with _side_stream(self._device, None):
                    waveform = self._waveform.cpu()
            progress.step()
        return waveform

    def _networks(self) -> tuple[Any, Any]:
        return self._decoder.use(WORK_BYTES), self._vocoder.use(WORK_BYTES)

    def _decode(self, decoder: Any, vocoder: Any, check: Callable[[], None] | None = None) -> Tensor:
        check = check or host().check_interrupt
        mel = decoder(self._latents.to(self._device, torch.float32), on_stage=check)
        return vocoder(mel, on_stage=check).float()

    def _runs_beside(self) -> bool:
        return self._device.type == "cuda"


@contextlib.contextmanager
def _side_stream(device: torch.device, after: torch.cuda.Event | None) -> Iterator[None]:
    """A device's stream for what goes on beside the node's; it waits for an event. Nothing on the CPU."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(torch.cuda.current_device() if device.index is None else device.index)
    with torch.cuda.stream(stream):
        if after is not None:
            stream.wait_event(after)
        yield


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    """One a device for good, as freed memory is kept for its stream.

    Urgent: the sound's small kernels would wait for every block of the large one before them.
    """
    return torch.cuda.Stream(torch.device("cuda", index), priority=-1)
