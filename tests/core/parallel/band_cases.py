"""Clips that ranks decode in bands of rows: the tiny decoders of all releases, drawn alike on every rank."""

import contextlib
import functools
import queue
import threading
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F
from ltx2_engine.ltx2_core.config.video_vae import VideoVAEConfig
from ltx2_engine.ltx2_core.decoding import decode_video
from ltx2_engine.ltx2_core.parallel.bands import WHOLE, Bands, deal
from ltx2_engine.ltx2_core.parallel.placement import lay_out
from ltx2_engine.ltx2_core.tiny import tiny_config
from ltx2_engine.ltx2_core.vae import layers, video_decoder
from ltx2_engine.ltx2_core.vae.tiling import TilePlan
from ltx2_engine.ltx2_core.vae.video_decoder import VideoDecoder

WHOLE_CLIP = TilePlan()


@dataclass(frozen=True)
class Case:
    """One clip. rows, columns, frames: of its latents. conditioned: by the decode timestep, and with noise."""

    label: str = "2.3"
    rows: int = 5
    columns: int = 2
    frames: int = 2
    batch: int = 1
    plan: TilePlan = WHOLE_CLIP
    conditioned: bool = False
    causal: bool = False
    dtype: torch.dtype = torch.float32
    frames_dtype: torch.dtype = torch.float32

    @property
    def frames_shape(self):
        return self.batch, 8 * self.frames - 7, 32 * self.rows, 32 * self.columns, 3


CASES = {
    "2.0": Case("2.0"),
    "2.3": Case(),
    "2.5": Case("2.5"),
    "conditioned": Case("2.0", conditioned=True),
    "even": Case(rows=4),
    "short pieces": Case(rows=6, frames=3, plan=TilePlan(8)),
    "pieces that vanish in a layer": Case(frames=3, plan=TilePlan(4)),
    "long pieces": Case("2.0", frames=4, plan=TilePlan(16)),
    "conditioned, in pieces": Case("2.0", conditioned=True, frames=3, plan=TilePlan(8)),
    "causal": Case("2.0", causal=True, frames=3, plan=TilePlan(8)),
    "two clips": Case(batch=2),
    "one frame": Case("2.0", frames=1),
    "fewer rows than ranks": Case(rows=3),
    "a row for each, mirrored": Case("2.0", rows=4, frames=3, plan=TilePlan(8)),
    "mirrored among two": Case("2.0", rows=2),
    "one row": Case(rows=1, frames=3, plan=TilePlan(8)),
    "columns as tiles": Case(rows=4, columns=7, plan=TilePlan(8, (4, 5), park=True)),
    "columns of the conditioned": Case("2.0", rows=3, columns=6, plan=TilePlan(8, (4, 4)), conditioned=True),
    "bfloat16": Case(dtype=torch.bfloat16, frames=3, plan=TilePlan(8)),
    "uint8": Case(frames_dtype=torch.uint8),
}


@functools.cache
def decoder_of(label, conditioned=False, causal=False, dtype=torch.float32):
    config = VideoVAEConfig.from_config(tiny_config(label))
    decoder = VideoDecoder(
        replace(config, decoder=replace(config.decoder, timestep_conditioning=conditioned, causal=causal))
    )
    generator = torch.Generator().manual_seed(0)
    for name, tensor in decoder.state_dict().items():
        spread = 1.5 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 and "table" not in name else 0.2
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread + name.endswith("std-of-means"))
        if name.endswith("timestep_scale_multiplier"):
            tensor.fill_(916.0)
        if dtype == torch.float64:
            tensor.copy_(_to_grid(tensor))
    return decoder.to(dtype).requires_grad_(False)


def setting(case):
    """The decoder and its latents."""
    decoder = decoder_of(case.label, case.conditioned, case.causal, case.dtype)
    shape = case.batch, decoder.config.latent_channels, case.frames, case.rows, case.columns
    return decoder, torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)


def decode(case, bands=WHOLE, frames=None, **options):
    """Frames of the whole clip, of which only this rank's rows are written where there are bands."""
    if frames is None:
        frames = torch.zeros(case.frames_shape, dtype=case.frames_dtype)
    decode_video(*setting(case), case.plan, frames, bands=bands, **options)
    return frames


# ranks that are threads ------------------------------------------------------------------------------------------------


class Thread:
    """The neighbours of one rank among threads: messages lie in queues. sent: shapes of what was exchanged."""

    def __init__(self, rank, mailboxes):
        self.rank, self.mailboxes, self.sent = rank, mailboxes, []

    def exchange_edges(self, top, bottom):
        self.sent.append(tuple(None if edge is None else tuple(edge.shape) for edge in (top, bottom)))
        places = ((self.rank - 1, top), (self.rank + 1, bottom))
        for other, edge in places:
            if edge is not None:
                assert edge.is_contiguous()
                self.mailboxes[self.rank, other].put(edge.clone())
        return tuple(
            None if edge is None else self.mailboxes[other, self.rank].get(timeout=20) for other, edge in places
        )


def on_threads(size, rows, run):
    """``run(bands)`` on so many ranks; what each has returned, and its neighbours. Raises what the first one raised."""
    mailboxes = {(a, b): queue.Queue() for a in range(size) for b in (a - 1, a + 1)}
    neighbours = [Thread(rank, mailboxes) for rank in range(size)]
    results, errors = [None] * size, [None] * size

    def one(rank):
        try:
            results[rank] = run(Bands(rank, deal(rows, size), neighbours[rank]))
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in filter(None, errors):
        raise error
    return results, neighbours


# arithmetic without roundings --------------------------------------------------------------------------------------------


def _to_grid(x):
    """Multiples of 1/64: their products and sums fit into float64, so a convolution has no order of sums."""
    return (x * 64).round() / 64


def _pixel_norm_silu(x, out, modulation=None):
    """Channel after channel, and contiguous, as what is not goes through another loop."""
    x = x.contiguous()
    squares = sum(channel * channel for channel in x.unbind(1)).unsqueeze(1)
    y = x / (squares / x.shape[1] + 1e-8).sqrt()
    if modulation is not None:
        y = y * (1 + modulation[1]) + modulation[0]
    return out.copy_(_to_grid(F.silu(y)))


@contextlib.contextmanager
def exact_convolutions():
    """Inside the block, cases of float64 are computed without any rounding in convolutions."""
    prepare = VideoDecoder.prepare
    with (
        mock.patch.object(VideoDecoder, "prepare", lambda *args: _to_grid(prepare(*args))),
        mock.patch.object(layers, "pixel_norm_silu", _pixel_norm_silu),
        mock.patch.object(video_decoder, "pixel_norm_silu", _pixel_norm_silu),
    ):
        yield


def places():
    """Where the frames of every case lie in memory."""
    return lay_out({name: (case.frames_dtype, case.frames_shape) for name, case in CASES.items()})
