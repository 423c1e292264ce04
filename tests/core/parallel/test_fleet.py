"""The engine of several processes on the tiny model, over Gloo: one process's clips, its stops, and failures of all kinds."""

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning.latent import AVLatent
from ltx2_engine.ltx2_core.fleet import engine as fleet_engine
from ltx2_engine.ltx2_core.fleet.team import SHARED_READING
from ltx2_engine.ltx2_core.handles import ModelHandle, open_engine
from ltx2_engine.ltx2_core.host import Interrupted, use_host
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.parallel.job_run import WorkerError
from ltx2_engine.ltx2_core.parallel.worker_group import WorkersBusy
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.standalone import StandaloneHost
from ltx2_engine.ltx2_core.testing import assert_close
from ltx2_engine.ltx2_core.text.enhance import EnhanceRequest
from ltx2_engine.ltx2_core.tiny import TEXT_ENCODER, checkpoint_file, write_tiny_set

from .fleet_cases import (
    ALL_PARTS,
    GUIDED,
    LONG,
    SHORT,
    RecordingHost,
    compare,
    conditioned,
    forget,
    job,
    kill_at,
    of_topology,
    parts_given,
    pids,
    same,
    stop_at,
    works,
)
from .observe import Sockets, after, alive, internet_sockets, wait_for

ROOT = Path(__file__).resolve().parents[3]


def is_loopback(line):
    address = line.split()[2].rpartition(":")[0]
    return address in ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


@pytest.fixture(scope="module", autouse=True)
def only_loopback_sockets():
    """From before the first worker until after the last one, every TCP and UDP socket is on loopback."""
    before = internet_sockets()
    sockets = Sockets()
    yield
    gc.collect()
    sockets.done.set()
    sockets.join()
    new = sockets.seen - before
    assert new, "the transport's own sockets were seen"
    assert [line for line in new if not is_loopback(line)] == []


@pytest.fixture
def recording():
    host = RecordingHost()
    with use_host(host), torch.inference_mode():
        yield host


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("fleet")
    write_tiny_set(root, "2.3")
    return root


@pytest.fixture(scope="module")
def spec(models):
    checkpoint, encoder = models / "checkpoints" / checkpoint_file("2.3"), models / "text_encoders" / TEXT_ENCODER
    return ModelSpec.of(checkpoint, encoder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def fault(tmp_path_factory):
    """The file that says what shall go wrong in a worker."""
    return tmp_path_factory.mktemp("faults") / "fault.json"


@pytest.fixture(scope="module")
def single(spec):
    """One process, and the prompts that it has encoded."""
    engine = open_engine(spec)
    with torch.inference_mode():
        return engine, engine.encode("a bell rings"), engine.encode("blurry")


@pytest.fixture(scope="module")
def fleet(spec, fault):
    """Two ranks for all tests; those that end them leave fresh ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet_engine, "ENTRY", Path(__file__).with_name("fleet_worker.py"))
        patch.setenv("LTX2_TEST_FAULT", str(fault))
        patch.setenv("OMP_NUM_THREADS", "1")
        engine = open_engine(replace(spec, ranks=2))
        yield engine
        engine.close()


@pytest.fixture(autouse=True)
def no_fault(fault):
    yield
    fault.unlink(missing_ok=True)


@pytest.mark.parametrize("topology", ["single", "tensor", "helix"])
def test_a_fleet_enhances_a_prompt_as_one_process(recording, fleet, single, topology):
    request = EnhanceRequest("a fox", seed=3, max_new_tokens=24, temperature=1.0, topology=topology)
    assert fleet.enhance(request) == single[0].enhance(request)
    context = fleet.encode("a bell rings")
    assert all(map(torch.equal, context.features.present(), single[1].features.present())), "it still encodes"


def test_a_prompt_that_cannot_be_enhanced_leaves_the_workers(recording, fleet, single):
    fleet.encode("a bell rings")
    before = pids(fleet)
    with pytest.raises(ValueError, match=r"at most 4096 are read"):
        fleet.enhance(EnhanceRequest("fox " * 5000, topology="tensor"))
    assert pids(fleet) == before


# clips ---------------------------------------------------------------------------------------------------------------


def test_a_fleet_encodes_samples_and_decodes_as_one_process(recording, fleet, single):
    one, positive, _ = single
    context = fleet.encode("a bell rings")
    assert all(map(torch.equal, context.features.present(), positive.features.present()))
    given = job(single, latent=conditioned())
    want, got = one.sample(given), fleet.sample(given)
    compare("two ranks against one", got, want)
    assert same(fleet.sample(given), got), "twice the same bits"
    clip, wanted = fleet.decode(want, "auto"), one.decode(want, "auto")
    # a convolution of a band may sum in another order
    assert_close("frames", clip.frames, wanted.frames, 1e-5)
    assert torch.equal(clip.waveform, wanted.waveform)
    assert (clip.sample_rate, clip.fps) == (wanted.sample_rate, wanted.fps)
    # progress of every part has come, and every display was closed
    labels = {label for label, _ in recording.reports}
    assert {"encoding the prompt", "sampling", "decoding video"} <= labels  # the sound is the last rank's
    assert ("sampling", len(SHORT) - 1) in recording.reports
    for label in labels:
        assert [value for known, value in recording.reports if known == label][-1] == "closed"
    assert any(picture is not None and picture.shape == (3, 3, 3) for picture in recording.pictures)


def test_native_text_is_finished_as_in_one_process(recording, fleet, single):
    one, positive, _ = single
    finished = torch.cat([*positive.features.present()], dim=-1)
    raw = torch.randn(1, 40, finished.shape[-1], generator=torch.Generator().manual_seed(0))
    for conditioning in ([[finished, {}]], [[raw, {"unprocessed_ltxav_embeds": True}]]):
        got, want = fleet.encode_native(conditioning), one.encode_native(conditioning)
        assert all(map(torch.equal, got.features.present(), want.features.present()))
    with pytest.raises(ValueError, match="wide"):
        fleet.encode_native([[raw[..., 1:], {}]])


def test_all_ranks_have_the_same_bits(recording, fleet, single):
    for topology in ("1x2", "2x1"):
        answers, _ = of_topology(fleet, topology)._run("sample", job=job(single, GUIDED), preview=None)
        digests = [answer.body["digest"] for answer in answers]
        assert len(digests) == 2
        assert len(set(digests)) == 1


@pytest.mark.parametrize("sampler", ["euler", "res_2s"])
def test_groups_give_the_bits_of_one_pass_after_the_other(recording, fleet, single, sampler):
    given = job(single, GUIDED, evaluation="split", sampler=sampler, latent=conditioned())
    want = single[0].sample(given)
    assert same(of_topology(fleet, "2x1").sample(given), want), "groups of one rank"
    compare("one group of two", of_topology(fleet, "1x2").sample(given), want)


def test_batched_passes_share_tokens_too(recording, fleet, single):
    given = job(single, GUIDED, evaluation="batched")
    compare("batched", fleet.sample(given), single[0].sample(given))


def test_large_jobs_go_through_shared_memory(recording, fleet, single, monkeypatch):
    monkeypatch.setattr("ltx2_engine.ltx2_core.fleet.requests._MOST_IN_A_MESSAGE", 0)
    given = job(single, latent=conditioned())
    compare("through shared memory", fleet.sample(given), single[0].sample(given))


def test_loras_belong_to_the_job(recording, fleet, single, models):
    lora = next((models / "loras").iterdir())
    ours, theirs = (ModelHandle(one.files.spec, one).with_lora(lora, 0.7) for one in (fleet, single[0]))
    before = pids(fleet)
    want = theirs.engine.sample(job(single))
    compare("with a LoRA", ours.engine.sample(job(single)), want)
    assert not same(single[0].sample(job(single)), want)
    works(fleet, single)
    assert pids(fleet) == before, "engines with other LoRAs have the same workers"
    assert "2 x cpu" in str(ours)
    assert ours.lora_report() == theirs.lora_report()


def test_upscaling_is_that_of_one_process(recording, fleet, single, models):
    upsampler = next((models / "latent_upscale_models").iterdir())
    latent = single[0].sample(job(single))
    assert same(fleet.upscale(latent, upsampler), single[0].upscale(latent, upsampler))


def test_four_ranks_make_the_clip_of_one(recording, spec, single):
    given = job(single, GUIDED, evaluation="split", latent=conditioned())
    want = single[0].sample(given)
    four = open_engine(replace(spec, ranks=4))
    try:
        for topology in ("1x4", "2x2", "4x1"):
            compare(topology, of_topology(four, topology).sample(given), want)
        # two of them have no rows
        assert_close("frames", four.decode(want, "auto").frames, single[0].decode(want, "auto").frames, 1e-5)
    finally:
        four.close()


# stops ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["1x2", "2x1"])
def test_a_stop_ends_the_job_within_a_second_and_not_the_workers(recording, fleet, single, topology):
    engine = of_topology(fleet, topology)
    engine.sample(job(single))
    before, asked = pids(fleet), stop_at(recording, 3)
    with pytest.raises(Interrupted):
        engine.sample(job(single, GUIDED, sigmas=LONG))
    assert time.monotonic() - asked[0] < 1.0
    recording.on_step = lambda value: None
    works(engine, single)
    assert pids(fleet) == before


def test_a_stop_of_a_decode_ends_it_in_all_bands(recording, fleet, single):
    shape = fleet.config.video_vae.latent_channels, 60, 4, 4
    video = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    latent, seen = AVLatent(ClipShape(473, 128, 128, 24.0), AV(video, None), streams=AV(True, False)), []
    works(fleet, single)
    before = pids(fleet)

    def stop(frames):
        seen.append(frames)
        if 0 < frames < 400:
            recording.interrupt()

    recording.on_frames = stop
    with pytest.raises(Interrupted):
        fleet.decode(latent, "temporal")
    assert seen[-1] < 473
    recording.on_frames = lambda frames: None
    works(fleet, single)
    assert pids(fleet) == before


def test_a_stop_that_is_there_before_a_rank_begins_leaves_the_workers(recording, fleet, single):
    fleet.sample(job(single))
    before = pids(fleet)
    # rank 0 is in the job when rank 1 reads job and stop at once
    os.kill(before[1], signal.SIGSTOP)
    recording.interrupt()
    after(0.5, lambda: os.kill(before[1], signal.SIGCONT))
    with pytest.raises(Interrupted):
        fleet.sample(job(single))
    works(fleet, single)
    assert pids(fleet) == before


def test_a_second_job_is_refused_while_one_runs(recording, fleet, single):
    refused = []

    def second():
        with use_host(StandaloneHost(progress="quiet")):
            try:
                fleet.encode("another")
            except WorkersBusy as error:
                refused.append(error)
        recording.interrupt()

    def begin(value):
        if value == 1:
            threading.Thread(target=second).start()

    recording.on_step = begin
    with pytest.raises(Interrupted):
        fleet.sample(job(single, sigmas=LONG))
    assert "have a job" in str(refused[0])


# failures ------------------------------------------------------------------------------------------------------------


def test_a_job_that_does_not_fit_reaches_no_worker(recording, fleet, single):
    with pytest.raises(ValueError, match="negative prompt"):
        fleet.sample(replace(job(single, GUIDED), negative=None))
    works(fleet, single)


def test_a_rank_without_room_is_an_error_before_the_first_step(recording, fleet, single, fault):
    fleet.sample(job(single))
    before = pids(fleet)
    fault.write_text(json.dumps({"rank": 1, "place": "before the first step"}))
    with pytest.raises(WorkerError, match=r"rank 1 failed .*HostOutOfMemory: the transformer does not fit") as caught:
        fleet.sample(job(single))
    assert caught.value.rank == 1
    fault.unlink()
    works(fleet, single)
    assert pids(fleet) == before, "all ranks knew, and live on"


def test_a_rank_that_fails_in_a_step_is_named_and_the_next_job_works(recording, fleet, single, fault):
    fleet.sample(job(single))
    generation, before = fleet.generation, pids(fleet)
    fault.write_text(json.dumps({"rank": 1, "place": "in a step"}))
    started = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 failed in stage 'sampling': RuntimeError: CUDA out of memory"):
        fleet.sample(job(single))
    assert time.monotonic() - started < 15
    fault.unlink()
    works(fleet, single)
    assert fleet.generation == generation + 1
    assert set(pids(fleet)).isdisjoint(before)


def test_a_killed_rank_is_named_and_the_next_job_works(recording, fleet, single):
    fleet.sample(job(single))
    before = pids(fleet)
    killed = kill_at(recording, 2, before[1])
    with pytest.raises(WorkerError, match="rank 1 failed in stage 'sampling': was ended by SIGKILL"):
        fleet.sample(job(single, sigmas=LONG))
    assert time.monotonic() - killed[0] < 15
    assert not any(map(alive, before))
    assert fleet._fleet.workers.bytes_on("cpu") == 0
    recording.on_step = lambda value: None
    works(fleet, single)


# the end -------------------------------------------------------------------------------------------------------------


def test_memory_is_given_back_and_taken_again(recording, fleet, single):
    fleet.sample(job(single))
    before, workers = pids(fleet), fleet._fleet.workers
    held = workers.bytes_on("cpu")
    assert held > 2 * single[0]._networks["transformer"].full_bytes * 0.9
    assert workers.release("cuda:0", None) == 0
    assert workers.release("cpu", 1) == held
    assert workers.bytes_on("cpu") == 0
    assert not any(map(alive, before))
    # a stop while ranks read leaves them as well
    recording.on_loading = lambda value: recording.interrupt()
    with pytest.raises(Interrupted):
        fleet.sample(job(single))
    recording.on_loading = lambda value: None
    fresh = pids(fleet)
    assert len(fresh) == 2
    works(fleet, single)
    assert pids(fleet) == fresh


# reading together ----------------------------------------------------------------------------------------------------


@pytest.fixture
def given(fault):
    """How many parts each rank was given in the last reading that they shared; a function that forgets what was."""
    parts_given(fault.parent)
    return lambda: parts_given(fault.parent)


def alive_without_reading(fleet):
    """Have workers that have read nothing."""
    with pytest.raises(ValueError, match="at most 4096 are read"):
        fleet.enhance(EnhanceRequest("fox " * 5000, topology="single"))


def test_ranks_share_what_they_read(recording, fleet, single, models, given):
    forget(fleet)
    fleet.start()
    works(fleet, single)
    assert given() == ALL_PARTS
    forget(fleet)
    # rank 0 reads the text encoder first
    fleet.encode("a bell rings")
    works(fleet, single)
    assert given() == ALL_PARTS
    # a LoRA too, in the three blocks
    lora = next((models / "loras").iterdir())
    ours, theirs = (ModelHandle(one.files.spec, one).with_lora(lora, 0.7) for one in (fleet, single[0]))
    compare("with a LoRA", ours.engine.sample(job(single)), theirs.engine.sample(job(single)))
    assert given() == [4, 4]
    # back: it was kept
    works(fleet, single)
    assert given() == [0, 0]
    forget(fleet)
    compare("both at once", ours.engine.sample(job(single)), theirs.engine.sample(job(single)))
    assert given() == ALL_PARTS
    theirs = ModelHandle(single[0].files.spec, single[0]).with_lora(lora, 0.3)
    ours = ModelHandle(fleet.files.spec, fleet).with_lora(lora, 0.3)
    compare("another strength", ours.engine.sample(job(single)), theirs.engine.sample(job(single)))
    assert given() == [4, 4]
    works(fleet, single)


def test_each_rank_reads_everything_where_the_environment_says_so(recording, fleet, single, given, monkeypatch):
    monkeypatch.setenv(SHARED_READING, "off")
    forget(fleet)
    works(fleet, single)
    assert given() == [0, 0]
    forget(fleet)


def test_ranks_that_decode_at_once_have_read_before(recording, fleet, single, fault, given):
    want = single[0].sample(job(single))
    forget(fleet)
    fault.write_text(json.dumps({"rank": 1, "place": "slow file"}))
    fleet.start()
    fleet.decode(want, "auto")
    assert given() == ALL_PARTS


@pytest.mark.parametrize("begin", ["in the background", "when they sample"])
def test_a_file_that_one_rank_cannot_read_ends_the_job(recording, fleet, single, fault, begin):
    forget(fleet)
    fault.write_text(json.dumps({"rank": 1, "place": "in a file"}))
    if begin == "in the background":
        fleet.start()
    else:
        alive_without_reading(fleet)
    before = pids(fleet)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"rank 1: .*tiny.safetensors: reading failed \(Input/output error\)"):
        fleet.sample(job(single))
    assert time.monotonic() - started < 3
    fault.unlink()
    works(fleet, single)
    assert pids(fleet) == before


def test_a_stop_while_one_rank_reads_slowly_ends_all(recording, fleet, single, fault):
    forget(fleet)
    alive_without_reading(fleet)
    before, asked = pids(fleet), []
    fault.write_text(json.dumps({"rank": 1, "place": "slow file"}))

    def stop(value):
        if not asked:
            asked.append(time.monotonic())
            recording.interrupt()

    recording.on_loading = stop
    with pytest.raises(Interrupted):
        fleet.sample(job(single))
    assert time.monotonic() - asked[0] < 1.0
    recording.on_loading = lambda value: None
    fault.unlink()
    works(fleet, single)
    assert pids(fleet) == before


def test_a_rank_that_is_killed_while_all_read_ends_them(recording, fleet, single, fault):
    forget(fleet)
    alive_without_reading(fleet)
    before = pids(fleet)
    fault.write_text(json.dumps({"rank": 1, "place": "slow file"}))
    after(0.5, lambda: os.kill(before[1], signal.SIGKILL))
    with pytest.raises(WorkerError, match="rank 1 failed"):
        fleet.sample(job(single, sigmas=LONG))
    fault.unlink()
    works(fleet, single)


def test_idle_workers_do_nothing(recording, fleet, single):
    fleet.sample(job(single))

    def seconds():
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids(fleet))

    before = seconds()
    time.sleep(1.0)
    assert seconds() - before < 0.2


PARENT = f"""
    import sys, types
    package = types.ModuleType("ltx2_engine")
    package.__path__ = [{str(ROOT)!r}]
    sys.modules["ltx2_engine"] = package
    from pathlib import Path
    from ltx2_engine.ltx2_core.handles import open_engine
    from ltx2_engine.ltx2_core.model_spec import ModelSpec

    spec = ModelSpec.of(Path(sys.argv[1]), Path(sys.argv[2]), dtype="float32", device="cpu", ranks=2)
    engine = open_engine(spec)
    engine.start()
    print(*engine._fleet.workers.group._processes.pids(), flush=True)
    sys.stdin.read()
"""


def test_no_worker_outlives_a_killed_parent(spec):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(spec.checkpoint), str(spec.text_encoder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        workers = list(map(int, parent.stdout.readline().split()))
        assert len(workers) == 2
        assert all(map(alive, workers))
        parent.kill()
    assert wait_for(lambda: not any(map(alive, workers)), 5.0)
