"""A fleet on GPUs, over NCCL: one reading, the clip of one GPU, the same bits twice, a Stop, a killed rank, the memory of many
clips. Two ranks share the only GPU."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ltx2_engine.ltx2_core.fleet import engine as fleet_engine
from ltx2_engine.ltx2_core.handles import open_engine
from ltx2_engine.ltx2_core.host import Interrupted, use_host
from ltx2_engine.ltx2_core.model_spec import ModelSpec
from ltx2_engine.ltx2_core.parallel.job_run import WorkerError
from ltx2_engine.ltx2_core.testing import cosine
from ltx2_engine.ltx2_core.tiny import TEXT_ENCODER, checkpoint_file, write_tiny_set

from .fleet_cases import (
    ALL_PARTS,
    GUIDED,
    LONG,
    OFF,
    RecordingHost,
    forget,
    job,
    kill_at,
    of_topology,
    parts_given,
    pids,
    same,
    stop_at,
)
from .observe import alive

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
# enough evaluations for graphs
STEPS = tuple(1 - step / 8 for step in range(9))
# of bfloat16 latents behind eight steps
LEAST_COSINE = 0.999
SETTLED, CLIPS = 10, 30
# what a driver keeps or gives back; a rank's frames of twenty clips are more
SLACK_BYTES = 6 << 20


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    root = tmp_path_factory.mktemp("fleet")
    write_tiny_set(root, "2.3")
    checkpoint, encoder = root / "checkpoints" / checkpoint_file("2.3"), root / "text_encoders" / TEXT_ENCODER
    return ModelSpec.of(checkpoint, encoder, dtype="bfloat16", device="cuda:0")


@pytest.fixture(scope="module")
def single(spec):
    engine = open_engine(spec)
    with torch.inference_mode():
        return engine, engine.encode("a bell rings"), engine.encode("blurry")


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def fleet(spec, faults):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet_engine, "ENTRY", Path(__file__).with_name("fleet_worker.py"))
        patch.setenv("LTX2_TEST_FAULT", str(faults / "none"))
        if torch.cuda.device_count() < 2:
            patch.setenv("LTX2_TEST_ONE_GPU", "1")
            patch.setattr(fleet_engine, "rank_devices", lambda *_: ("cuda:0", "cuda:0"))
        engine = open_engine(replace(spec, ranks=2))
        yield engine
        engine.close()


@pytest.fixture
def recording():
    host = RecordingHost()
    with use_host(host), torch.inference_mode():
        yield host


def alike(got, want):
    for ours, theirs in zip(got.latents.present(), want.latents.present(), strict=True):
        assert float(theirs.float().std()) > 0.05
        assert cosine(ours, theirs) > LEAST_COSINE


@pytest.mark.parametrize(("topology", "guidance"), [("1x2", OFF), ("1x2", GUIDED), ("2x1", GUIDED)])
def test_two_gpus_make_the_clip_of_one_and_the_same_bits_twice(recording, fleet, single, topology, guidance):
    engine, given = of_topology(fleet, topology), job(single, guidance, sigmas=STEPS)
    got = engine.sample(given)
    alike(got, single[0].sample(given))
    assert same(engine.sample(given), got)
    answers, _ = engine._run("sample", job=given, preview=None)
    assert len({answer.body["digest"] for answer in answers}) == 1


def test_ranks_share_what_they_read(recording, fleet, single, faults):
    fleet.sample(job(single))
    forget(fleet)
    parts_given(faults)
    got = fleet.sample(job(single))
    assert parts_given(faults) == ALL_PARTS
    alike(got, single[0].sample(job(single)))


def test_two_gpus_decode_the_frames_of_one(recording, fleet, single):
    latents = single[0].sample(job(single))
    clip, wanted = fleet.decode(latents, "auto"), single[0].decode(latents, "auto")
    assert cosine(clip.frames, wanted.frames) > LEAST_COSINE
    assert cosine(clip.waveform, wanted.waveform) > LEAST_COSINE


@pytest.mark.parametrize("topology", ["1x2", "2x1"])
def test_a_stop_ends_the_job_within_a_second_and_not_the_workers(recording, fleet, single, topology):
    engine = of_topology(fleet, topology)
    engine.sample(job(single))
    before, asked = pids(fleet), stop_at(recording, 20)
    with pytest.raises(Interrupted):
        engine.sample(job(single, GUIDED, sigmas=LONG))
    seconds = time.monotonic() - asked[0]
    print(f"stopped in {seconds:.3f} s")
    assert seconds < 1.0
    recording.on_step = lambda value: None
    alike(engine.sample(job(single)), single[0].sample(job(single)))
    assert pids(fleet) == before


def test_a_killed_rank_is_named_and_the_next_job_works(recording, fleet, single):
    fleet.sample(job(single))
    before = pids(fleet)
    killed = kill_at(recording, 20, before[1])
    with pytest.raises(WorkerError, match="rank 1 failed in stage 'sampling': was ended by SIGKILL"):
        fleet.sample(job(single, sigmas=LONG))
    told = time.monotonic() - killed[0]
    assert not any(map(alive, before))
    recording.on_step = lambda value: None
    got = fleet.sample(job(single))
    again = time.monotonic() - killed[0]
    print(f"told in {told:.2f} s, the next clip {again:.1f} s behind the kill")
    assert told < 15
    assert again < 60
    alike(got, single[0].sample(job(single)))


def test_what_devices_hold_does_not_grow_from_clip_to_clip(recording, fleet, single):
    engines, given = [of_topology(fleet, topology) for topology in ("1x2", "2x1")], job(single, GUIDED, sigmas=STEPS)
    for number in range(CLIPS):
        clip = engines[number % 2].decode(engines[number % 2].sample(given), "auto")
        assert float(clip.frames.std()) > 0.01
        if number + 1 == SETTLED:
            before = free_bytes()
    lost = [then - now for then, now in zip(before, free_bytes(), strict=True)]
    print(f"{CLIPS - SETTLED} clips took {[count >> 10 for count in lost]} KiB of each GPU")
    assert max(lost) <= SLACK_BYTES


def free_bytes():
    return [torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count())]
