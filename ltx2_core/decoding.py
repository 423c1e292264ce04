"""A clip's latents become frames in host memory: all of it in one process, or a band of rows on each of several ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from .frames import deliver
from .parallel.bands import WHOLE, Bands
from .sampling.noise import generator
from .sound import SoundDecoding
from .vae import tiling
from .vae.tiling import TilePlan
from .vae.video_decoder import VideoDecoder

_LOG = logging.getLogger("ltx2.engine")

# The reference draws the decoder's noise from the run's generator; a fixed seed keeps decoding repeatable by itself.
_NOISE_SEED = 42


@torch.no_grad()
def decode_video(
    decoder: VideoDecoder,
    latents: Tensor,
    plan: TilePlan,
    frames: Tensor,
    *,
    bands: Bands = WHOLE,
    sound: SoundDecoding | None = None,
    on_frames: Callable[[int], None] = lambda done: None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Decode normalised latents [B, C, F', H', W'] and write this rank's rows of all frames.

    frames: [B, F, H, W, 3] float32 (0..1) or uint8 (0..255) in host memory, the whole clip's on every rank; in memory
    that ranks share, each writes its rows of it, and all are there when all ranks have returned.
    plan, bands: ``tiling.plan_decode`` for so many ranks, ``Bands(rank, deal(H', ranks), neighbours)``. The ranks have
    equal latents and plans, and call this together; one that has no rows does too.
    sound: decoded beside the picture, if it was prepared, on the rank that has it; the last one's band is not the tallest.
    on_frames: called with the number of this rank's frames that are done. check: called before every layer, equally often
    and at the same places between exchanges on all ranks, so it may ask another rank. Both may raise to stop; on several
    ranks ``check`` does so on all of them in the same call, for a rank waits for its neighbours, and ``on_frames`` never.
    Raises ValueError for frames, bands or a plan that do not fit the latents.
    """
    _check_frames(decoder, latents, frames)
    _tell(plan, bands)
    device = decoder.conv_in.conv.weight.device
    noise = generator(_NOISE_SEED, device) if decoder.config.timestep_conditioning else None
    pieces = tiling.decode(decoder, latents, plan, noise=noise, bands=bands, check=check)
    own = frames[:, :, bands.rows(decoder.config.spatial_factor)]
    if bands.size == 1:
        if sound is not None:
            pieces = sound.beside(pieces)
        deliver(pieces, own, device, on_frames, check)
        return
    # the sound, and waiting for the device, ask for no interrupt: other ranks would not ask as often
    if sound is not None:
        pieces = sound.beside(pieces, check=lambda: None)
    deliver(pieces, own, device, on_frames)


def _check_frames(decoder: VideoDecoder, latents: Tensor, frames: Tensor) -> None:
    batch, _, count, height, width = latents.shape
    time, space = decoder.config.temporal_factor, decoder.config.spatial_factor
    want = (batch, time * (count - 1) + 1, height * space, width * space, 3)
    if frames.shape != want or frames.dtype not in (torch.float32, torch.uint8):
        raise ValueError(
            f"these latents become frames {want} of float32 or uint8, there are {tuple(frames.shape)} of {frames.dtype}"
        )


def _tell(plan: TilePlan, bands: Bands) -> None:
    if bands.rank:
        return
    if bands.size == 1:
        _LOG.info("decoding video %s", plan)
        return
    _LOG.info("decoding video %s, in bands of %s latent rows", plan, ", ".join(map(str, bands.heights)))
    idle = bands.heights.count(0)
    if idle:
        _LOG.info("%d of %d ranks have no rows: the picture has too few", idle, bands.size)
