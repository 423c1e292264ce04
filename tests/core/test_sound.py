"""Sound that is decoded beside the video: the same bits, every error, no thread left, and only where there is room."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from ltx2_engine.ltx2_core import engine as engine_module
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
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ltx2 ")], "a thread is left"


@pytest.fixture
def beside(monkeypatch):
    """Lets the CPU run two decodes at once, and counts those that were begun."""
    begun = []
    begin = SoundDecoding.begin

    def watched(self):
        begin(self)
        begun.append(self._task is not None)

    monkeypatch.setattr(SoundDecoding, "_can_run_beside", lambda self: True)
    monkeypatch.setattr(SoundDecoding, "begin", watched)
    return begun


def latent(engine) -> AVLatent:
    audio, generator = engine.config.audio_vae, torch.Generator().manual_seed(0)
    video = torch.randn(1, engine.config.video_vae.latent_channels, *CLIP.grid, generator=generator)
    shape = (1, audio.latent_channels, CLIP.audio_latents, audio.latent_mel_bins)
    return AVLatent(CLIP, AV(video, torch.randn(shape, generator=generator)))


def failing(monkeypatch, network, error):
    """The network's forward raises."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(type(network), "forward", fail)


@pytest.mark.parametrize("label", ["2.0", "2.3"])
def test_beside_the_video_the_bits_are_the_same(tiny_engine, monkeypatch, label):
    engine = tiny_engine(label)
    alone = engine.decode(latent(engine), "temporal")
    monkeypatch.setattr(SoundDecoding, "_can_run_beside", lambda self: True)
    both = engine.decode(latent(engine), "temporal")
    assert torch.equal(both.frames, alone.frames)
    assert torch.equal(both.waveform, alone.waveform)


def test_it_is_begun_once_the_video_has_its_place(tiny_engine, beside):
    engine = tiny_engine("2.3")
    engine.decode(latent(engine), "auto")
    engine.decode(latent(engine).without_video(), "auto")
    assert beside == [True]


def test_on_the_cpu_one_comes_after_the_other(tiny_engine, monkeypatch):
    engine, order = tiny_engine("2.3"), []
    decode, deliver = SoundDecoding._decode, engine_module.deliver

    def video(*arguments):
        deliver(*arguments)
        order.append("video")

    def sound(self, *arguments):
        order.append(threading.current_thread().name)
        return decode(self, *arguments)

    monkeypatch.setattr(engine_module, "deliver", video)
    monkeypatch.setattr(SoundDecoding, "_decode", sound)
    engine.decode(latent(engine), "auto")
    assert order == ["video", threading.current_thread().name]


def test_an_error_of_the_sound_surfaces(tiny_engine, beside, monkeypatch):
    engine = tiny_engine("2.3")
    failing(monkeypatch, engine._networks["vocoder"].use(0), ValueError("no sound"))
    with pytest.raises(ValueError, match="no sound"):
        engine.decode(latent(engine), "auto")
    assert beside == [True]


def test_an_error_of_the_video_stops_the_sound(tiny_engine, beside, monkeypatch):
    engine, steps = tiny_engine("2.3"), []

    def endless(self, mel, on_stage):
        while True:
            steps.append(1)
            time.sleep(0.005)
            on_stage()

    def fail(*_):
        while not steps:
            time.sleep(0.005)
        raise ValueError("no picture")

    monkeypatch.setattr(type(engine._networks["vocoder"].use(0)), "forward", endless)
    monkeypatch.setattr(engine_module, "deliver", fail)
    with pytest.raises(ValueError, match="no picture"):
        engine.decode(latent(engine), "auto")


@pytest.mark.parametrize("video_ends", [False, True])
def test_an_interrupt_stops_both_and_is_raised_once(tiny_engine, beside, monkeypatch, tmp_path, video_ends):
    engine = tiny_engine("2.3")
    started = threading.Event()

    def endless(self, mel, on_stage):
        started.set()
        while True:
            time.sleep(0.005)
            on_stage()

    def slow(pieces, frames, device, on_frames, check):
        while not (video_ends and started.is_set()):
            time.sleep(0.005)
            check()

    monkeypatch.setattr(type(engine._networks["vocoder"].use(0)), "forward", endless)
    monkeypatch.setattr(engine_module, "deliver", slow)
    with use_host(StandaloneHost(output_dir=tmp_path, progress="quiet")) as host:

        def interrupt():
            started.wait()
            time.sleep(0.1)
            host.interrupt()

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(Interrupted):
            engine.decode(latent(engine), "auto")
        thread.join()
        assert not host.interrupted(), "the next run would be interrupted too"


class Network(SimpleNamespace):
    """A component of the CPU with 100 bytes of weights."""

    def __init__(self, missing: int = 100):
        super().__init__(missing_bytes=missing, device="cpu", uses=0)

    def use(self, work_bytes):
        self.uses += 1
        self.missing_bytes = 0
        return lambda x, on_stage: x + 1


@pytest.mark.parametrize(
    ("free", "left"), [(None, 0), (WORK_BYTES + 249, 0), (WORK_BYTES + 250, WORK_BYTES), (10**15, WORK_BYTES)]
)
def test_it_is_prepared_where_it_fits_beside_the_others(beside, free, left):
    decoder, vocoder = Network(), Network()
    with SoundDecoding(torch.zeros(2), decoder, vocoder) as sound:
        assert sound.prepare(free, 50) == left
        assert decoder.uses == vocoder.uses == (1 if left else 0)
        sound.begin()
        assert beside == [bool(left)]
        assert torch.equal(sound.result(), torch.full((2,), 2.0))


def test_it_comes_after_the_video_when_that_took_its_memory(beside):
    decoder, vocoder = Network(), Network()
    with SoundDecoding(torch.zeros(2), decoder, vocoder) as sound:
        assert sound.prepare(10**15, 0) == WORK_BYTES
        decoder.missing_bytes = 100
        sound.begin()
        assert beside == [False]
        assert torch.equal(sound.result(), torch.full((2,), 2.0))
        assert decoder.uses == 2
