"""Sound that is decoded beside the video: the same bits, every error, and only where there is room."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from ltx2_engine.ltx2_core import decoding
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.host import Interrupted, use_host
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.sound import WORK_BYTES, SoundDecoding
from ltx2_engine.ltx2_core.standalone import StandaloneHost

CLIP = ClipShape(17, 64, 96, 24.0)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def beside(monkeypatch):
    """Has the sound decoded between the pieces of video, as on a GPU."""
    monkeypatch.setattr(SoundDecoding, "_runs_beside", lambda self: True)


@pytest.fixture
def order(monkeypatch):
    """What is done, in order: the number of frames that have arrived, and "sound"."""
    done = []
    decode, deliver = SoundDecoding._decode, decoding.deliver

    def video(pieces, frames, device, on_frames, check):
        deliver(pieces, frames, device, done.append, check)

    def sound(self, *networks):
        done.append("sound")
        return decode(self, *networks)

    monkeypatch.setattr(decoding, "deliver", video)
    monkeypatch.setattr(SoundDecoding, "_decode", sound)
    return done


def latent(engine) -> AVLatent:
    audio, generator = engine.config.audio_vae, torch.Generator().manual_seed(0)
    video = torch.randn(1, engine.config.video_vae.latent_channels, *CLIP.grid, generator=generator)
    shape = (1, audio.latent_channels, CLIP.audio_latents, audio.latent_mel_bins)
    return AVLatent(CLIP, AV(video, torch.randn(shape, generator=generator)))


@pytest.mark.parametrize("label", ["2.0", "2.3"])
def test_beside_the_video_the_bits_are_the_same(tiny_engine, monkeypatch, label):
    engine = tiny_engine(label)
    alone = engine.decode(latent(engine), "temporal")
    monkeypatch.setattr(SoundDecoding, "_runs_beside", lambda self: True)
    both = engine.decode(latent(engine), "temporal")
    assert torch.equal(both.frames, alone.frames)
    assert torch.equal(both.waveform, alone.waveform)


def test_on_the_cpu_the_sound_comes_after_the_video(tiny_engine, order):
    engine = tiny_engine("2.3")
    engine.decode(latent(engine), "temporal")
    assert order[-2:] == [17, "sound"]


def test_beside_the_video_it_is_asked_for_after_the_first_piece(tiny_engine, beside, order):
    engine = tiny_engine("2.3")
    engine.decode(latent(engine), "temporal")
    assert order[0] == "sound"
    assert order[-1] == 17
    assert order.count("sound") == 1
    order.clear()
    engine.decode(latent(engine).without_video(), "auto")
    assert order == ["sound"]


@pytest.mark.parametrize("network", ["video_decoder", "audio_decoder", "vocoder"])
def test_an_error_of_either_surfaces_and_leaves_the_engine_usable(tiny_engine, beside, monkeypatch, network):
    engine = tiny_engine("2.3")
    want = engine.decode(latent(engine), "auto")

    def fail(*_, **__):
        raise ValueError("not decoded")

    with monkeypatch.context() as patch:
        kind = type(engine._networks[network].use(0))
        patch.setattr(kind, "stream" if network == "video_decoder" else "forward", fail)
        with pytest.raises(ValueError, match="not decoded"):
            engine.decode(latent(engine), "auto")
    again = engine.decode(latent(engine), "auto")
    assert torch.equal(again.frames, want.frames)
    assert torch.equal(again.waveform, want.waveform)


def test_an_interrupt_during_the_sound_is_raised_once(tiny_engine, beside, monkeypatch, tmp_path):
    engine, stages = tiny_engine("2.3"), []
    with use_host(StandaloneHost(output_dir=tmp_path, progress="quiet")) as host:

        def interrupted(self, mel, on_stage):
            host.interrupt()
            stages.append(1)
            on_stage()
            stages.append(2)

        monkeypatch.setattr(type(engine._networks["vocoder"].use(0)), "forward", interrupted)
        with pytest.raises(Interrupted):
            engine.decode(latent(engine), "auto")
        assert stages == [1]
        assert not host.interrupted(), "the next run would be interrupted too"


class Network(SimpleNamespace):
    """A component of the CPU with 100 bytes of weights."""

    def __init__(self):
        super().__init__(missing_bytes=100, device="cpu", uses=0)

    def use(self, work_bytes):
        self.uses += 1
        self.missing_bytes = 0
        return lambda x, on_stage: x + 1


@pytest.mark.parametrize(
    ("free", "left"), [(None, 0), (WORK_BYTES + 249, 0), (WORK_BYTES + 250, WORK_BYTES), (10**15, WORK_BYTES)]
)
def test_it_is_prepared_where_it_fits_beside_the_others(beside, free, left):
    decoder, vocoder = Network(), Network()
    sound = SoundDecoding(torch.zeros(2), decoder, vocoder)
    assert sound.prepare(free, 50) == left
    assert decoder.uses == vocoder.uses == (1 if left else 0)
    list(sound.beside(torch.zeros(3)))
    assert torch.equal(sound.result(), torch.full((2,), 2.0))
    assert decoder.uses == vocoder.uses == 1


def test_it_comes_after_the_video_when_that_took_its_memory(beside):
    decoder, vocoder = Network(), Network()
    sound = SoundDecoding(torch.zeros(2), decoder, vocoder)
    assert sound.prepare(10**15, 0) == WORK_BYTES
    decoder.missing_bytes = 100
    list(sound.beside(torch.zeros(3)))
    assert torch.equal(sound.result(), torch.full((2,), 2.0))
    assert decoder.uses == 2


def test_it_holds_no_piece_of_the_video(beside):
    def pieces():
        for _ in range(3):
            piece = torch.zeros(1)
            alive.append(weakref.ref(piece))
            yield piece
            del piece
            assert all(one() is None for one in alive)

    alive = []
    for piece in SoundDecoding(torch.zeros(2), Network(), Network()).beside(pieces()):
        del piece
    assert len(alive) == 3
