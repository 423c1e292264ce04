"""A model's encoders, as conditions ask for them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from .host import host
from .phases import phase
from .presets import default_image_crf
from .vae import tiling
from .vae.audio import encode_waveform

if TYPE_CHECKING:
    from .engine import LocalEngine

_AUDIO_WORK_BYTES = 1 << 30


class ModelEncoders:
    """The model's encoders for conditions (`conditioning.condition.Encoders`)."""

    def __init__(self, engine: LocalEngine):
        self._engine = engine

    @property
    def default_crf(self) -> int:
        return default_image_crf(self._engine.files.version)

    def video(self, pixels: Tensor) -> Tensor:
        engine = self._engine
        plan_for = partial(
            tiling.plan_encode, engine.config.video_vae, tuple(pixels.shape), engine.dtype.itemsize, choice="auto"
        )
        with phase("encoding pictures", engine.device):
            encoder = engine._networks["video_encoder"].use(plan_for(None).work_bytes)
            plan = plan_for(engine._free_bytes())
            with host().progress(pixels.shape[2], "encoding pictures") as progress:
                return tiling.encode(encoder, pixels.to(engine.dtype), plan, lambda done, _: progress.to(done))

    def audio(self, waveform: Tensor, sample_rate: int) -> Tensor:
        engine = self._engine
        with phase("encoding sound", engine.device):
            encoder = engine._networks["audio_encoder"].use(_AUDIO_WORK_BYTES)
            host().check_interrupt()
            return encode_waveform(encoder, waveform, sample_rate, engine.config.audio_vae).to(engine.dtype)
