"""Decoding the sound of a clip, on a GPU beside the picture: neither alone keeps the device and the host busy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .background import Background
from .component import Component
from .host import Interrupted, host

WORK_BYTES = 1 << 30


class SoundDecoding:
    """Latents [B, C, T, mel bins / 4] on their way to a waveform [B, 2, N] float32 on the CPU.

    ``prepare`` and ``begin`` start it in a thread, where there is room for that; ``result`` waits for it, or does all of
    it. As a context manager it leaves no thread behind.
    """

    def __init__(self, latents: Tensor, decoder: Component[Any], vocoder: Component[Any]):
        self._latents, self._decoder, self._vocoder = latents, decoder, vocoder
        self._prepared: tuple[Any, Any] | None = None
        self._task: Background[Tensor] | None = None

    def __enter__(self) -> SoundDecoding:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._task is not None:
            self._task.stop()

    def prepare(self, free_bytes: int | None, others_bytes: int) -> int:
        """Place the networks if they and the work fit beside what others need; returns the bytes of work to leave free.

        Others place theirs between this and ``begin``: making room for one network may take the memory of another.
        """
        missing = self._decoder.missing_bytes + self._vocoder.missing_bytes
        if not self._can_run_beside() or free_bytes is None or free_bytes < missing + WORK_BYTES + others_bytes:
            return 0
        self._prepared = self._networks()
        return WORK_BYTES

    def begin(self) -> None:
        """Start, if the sound was prepared and nobody took its networks' memory."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or self._decoder.missing_bytes or self._vocoder.missing_bytes:
            return

        def work(task: Background[Tensor]) -> Tensor:
            return self._decode(*prepared, task.check)

        device, interrupted = torch.device(self._decoder.device), host().interrupted
        self._task = Background("decoding sound", work, device=device, interrupted=interrupted, urgent=True)

    def result(self) -> Tensor:
        """The waveform. Raises what decoding raised, and what the user's interrupt raises."""
        with host().progress(1, "decoding sound") as progress:
            waveform = self._decode(*self._networks(), host().check_interrupt) if self._task is None else self._wait()
            progress.step()
        return waveform

    def _wait(self) -> Tensor:
        assert self._task is not None
        try:
            return self._task.result(lambda _: host().check_interrupt())
        except Interrupted:
            # the thread may have seen the interrupt before this one did, which says it in the host's way
            host().check_interrupt()
            raise

    def _networks(self) -> tuple[Any, Any]:
        return self._decoder.use(WORK_BYTES), self._vocoder.use(WORK_BYTES)

    def _decode(self, decoder: Any, vocoder: Any, check: Callable[[], None]) -> Tensor:
        mel = decoder(self._latents.to(self._decoder.device, torch.float32), on_stage=check)
        return vocoder(mel, on_stage=check).float().cpu()

    def _can_run_beside(self) -> bool:
        # threads of the CPU would take each other's cores
        return torch.device(self._decoder.device).type == "cuda"
