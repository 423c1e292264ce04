"""A rough picture of the clip while it is sampled, without making the host wait for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .conditioning.state import LatentState
from .host import PreviewSpec
from .shapes import ClipShape

if TYPE_CHECKING:
    import numpy as np


class Previewer:
    """Turns the first latent frame of an estimate into colours by a linear map, as ComfyUI's latent2rgb does.

    Colours are copied while later work runs on the device: ``take`` returns a picture only once it has arrived, so a
    preview is an evaluation or two behind and costs no wait.
    """

    def __init__(self, spec: PreviewSpec, state: LatentState, clip: ClipShape):
        device = state.latent.device
        self._size = clip.latent_height, clip.latent_width
        self._factors = torch.tensor(spec.factors, device=device)
        self._bias = torch.tensor(spec.bias, device=device)
        pinned = device.type == "cuda"
        self._arriving = torch.empty(*self._size, 3, dtype=torch.uint8, pin_memory=pinned)
        self._copied: Any = torch.cuda.Event() if pinned else None
        self._pending = False

    def offer(self, x0: Tensor) -> None:
        """Start on the estimate [B, T, C]; skipped while an earlier one is on its way."""
        if self._pending:
            return
        cells = self._size[0] * self._size[1]
        colours = x0[0, :cells].float() @ self._factors + self._bias
        picture = ((colours + 1) * 127.5).clamp(0, 255).to(torch.uint8).unflatten(0, self._size)
        self._arriving.copy_(picture, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._pending = True

    def take(self) -> np.ndarray | None:
        """The picture [rows, columns, 3] uint8 of an earlier offer, once; ``None`` while there is none."""
        if not self._pending or (self._copied is not None and not self._copied.query()):
            return None
        self._pending = False
        return self._arriving.numpy().copy()
