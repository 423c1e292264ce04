"""Ranks of one video that torchrun starts on two machines: two agents here, and two network namespaces where allowed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ltx2_engine import cli
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.parallel.groups import Topology
from ltx2_engine.ltx2_core.parallel.topology import StageWork
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.torchrun import TorchrunRanks
from ltx2_engine.nodes.runner.torchrun import Place

from .lossless import contents, lossless

ROOT = Path(cli.__file__).parent
PORT = 29411
GUIDED = {
    "preset": "guided 2.3/2.5",
    "video_cfg": 3.0,
    "video_stg": 1.0,
    "video_modality": 3.0,
    "audio_cfg": 7.0,
    "audio_stg": 1.0,
    "audio_modality": 3.0,
    "stg_blocks": "1",
}


def can_make_namespaces():
    """Whether this user may, with a system call that leaves no trace: in a process of its own."""
    unshare = shutil.which("unshare")
    return (
        unshare is not None
        and subprocess.run([unshare, "-n", "true"], capture_output=True, check=False).returncode == 0
    )


@pytest.fixture
def loopback():
    """Machines that are none: (what a command begins with, address of the first one, network interface)."""
    if can_make_namespaces():
        pytest.skip("two network namespaces show the same and more")
    return [[], []], "127.0.0.1", "lo"


@pytest.fixture
def namespaces():
    """Two network namespaces, joined by a pair of virtual interfaces."""
    ip, names = shutil.which("ip"), [f"ltx2-{os.getpid()}-{index}" for index in range(2)]
    if ip is None:
        pytest.skip("network namespaces need the command ip")

    def call(*arguments):
        return subprocess.run([ip, *arguments], capture_output=True, text=True, check=False)

    made = call("netns", "add", names[0])
    if made.returncode:
        pytest.skip(f"network namespaces need the right to make them (root or CAP_NET_ADMIN): {made.stderr.strip()}")
    try:
        steps = [["netns", "add", names[1]]]
        steps += [
            ["link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1]]
        ]
        for index, name in enumerate(names):
            steps.append(["-n", name, "addr", "add", f"10.213.7.{index + 1}/24", "dev", "veth0"])
            steps += [["-n", name, "link", "set", device, "up"] for device in ("lo", "veth0")]
        for step in steps:
            done = call(*step)
            if done.returncode:
                pytest.skip(f"this machine has no pairs of virtual interfaces: {done.stderr.strip()}")
        yield [[ip, "netns", "exec", name] for name in names], "10.213.7.1", "veth0"
    finally:
        for name in names:
            call("netns", "delete", name)


@pytest.fixture
def guided(tmp_path, tiny_prompt):
    """A guided workflow of four passes, and the files of one process that evaluates one after the other."""
    prompt = tiny_prompt("text_to_video", LTX2EmptyLatent={"frames": 9}, LTX2Guider=GUIDED)
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(lossless(prompt)))
    return path


def two_machines(places, flow, models, output):
    """The exit codes and the output of one agent of torchrun on each machine."""
    prefixes, address, interface = places
    environment = os.environ | {"GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", address, "--master-port", str(PORT)]
    agents = [
        subprocess.Popen(
            [
                *(*prefix, sys.executable, "-m", "torch.distributed.run", *rendezvous, "--node-rank", str(index)),
                *(str(ROOT / "cli.py"), "run", str(flow), "--models", str(models), "--disable-metadata"),
                *("--output", str(output / f"machine-{index}")),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, prefix in enumerate(prefixes)
    ]
    try:
        logs = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    return [agent.returncode for agent in agents], logs


@pytest.mark.parametrize("network", ["loopback", "namespaces"])
def test_guidance_groups_on_two_machines_make_the_bits_of_one_process(network, guided, tmp_path, tiny_models, request):
    places = request.getfixturevalue(network)
    codes, logs = two_machines(places, guided, tiny_models, tmp_path)
    assert codes == [0, 0], logs
    assert "topology 2x1 (groups x ranks of a group) of 4 passes" in logs[0]
    assert not (tmp_path / "machine-1").exists(), "rank 0 keeps the clip"

    alone = ["--models", str(tiny_models), "--output", str(tmp_path / "alone"), "--set", "LTX2Guider.evaluation=split"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.main(["run", str(guided), "--quiet", "--disable-metadata", *alone]) == 0
    finally:
        torch.set_num_threads(threads)
    made = contents(tmp_path / "machine-0")
    assert len(made) == 10, "nine frames and a sound"
    assert made == contents(tmp_path / "alone")


def ranks(size, per_machine):
    """Ranks without a process group."""
    made = object.__new__(TorchrunRanks)
    made.rank, made.size, made._per_machine, made.takes_passes_apart = 0, size, per_machine, size > per_machine
    return made


@pytest.fixture(scope="module")
def work():
    from ltx2_engine.ltx2_core.config.released import released_config
    from ltx2_engine.ltx2_core.config.transformer import TransformerConfig

    return StageWork(24576, 1024, TransformerConfig.from_config(released_config("2.3")))


PASSES = plan_passes(AV(*[StreamGuidance(cfg=3.0, stg=1.0, modality=3.0, stg_blocks=(28,))] * 2))


@pytest.mark.parametrize("num_passes", [1, 2, 4])
@pytest.mark.parametrize(("size", "per_machine"), [(2, 1), (4, 2), (8, 4), (6, 2), (4, 1)])
def test_ranks_that_share_tokens_are_of_one_machine(work, size, per_machine, num_passes):
    topology = ranks(size, per_machine).topology(work, PASSES[:num_passes], "auto", batched=False)
    assert topology.groups * topology.ulysses == size
    for group in topology.within:
        assert len({rank // per_machine for rank in group}) == 1


def test_machines_share_passes_and_the_ranks_of_a_machine_their_tokens(work):
    assert ranks(4, 2).topology(work, PASSES[:2], "auto", batched=False) == Topology(2, 2)
    assert ranks(4, 2).topology(work, PASSES, "auto", batched=False) == Topology(4, 1)
    assert ranks(2, 2).topology(work, PASSES[:1], "auto", batched=False) == Topology(1, 2)
    assert ranks(2, 2).topology(work, PASSES, "auto", batched=True) == Topology(1, 2)


def test_passes_in_one_evaluation_cannot_be_shared_by_machines(work):
    with pytest.raises(ValueError, match="choose split or auto"):
        ranks(2, 1).topology(work, PASSES, "auto", batched=True)


def test_machines_have_as_many_ranks_each():
    with pytest.raises(ValueError, match=r"5 ranks, 2 of them here.*--nproc-per-node"):
        TorchrunRanks(0, 5, 2)


def test_a_model_on_several_gpus_and_torchrun_exclude_each_other(tiny_models):
    from ltx2_engine.ltx2_core.handles import open_engine
    from ltx2_engine.ltx2_core.model_spec import ModelSpec
    from ltx2_engine.ltx2_core.ranks import use_ranks

    checkpoint = tiny_models / "checkpoints" / "ltx-2.3-22b-distilled.safetensors"
    encoder = tiny_models / "text_encoders" / "gemma-3-tiny"
    spec = ModelSpec.of(checkpoint, encoder, dtype="float32", device="cpu", ranks=2)
    with use_ranks(ranks(2, 1)), pytest.raises(ValueError, match="choose 1 GPU in the model, not 2"):
        open_engine(spec)


@pytest.fixture
def environment(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


def test_only_torchrun_gives_a_place(environment):
    environment("RANK", "1")
    assert Place.of_environment() is None
    environment("TORCHELASTIC_RUN_ID", "x")
    environment("WORLD_SIZE", "4")
    environment("LOCAL_RANK", "1")
    environment("LOCAL_WORLD_SIZE", "2")
    assert Place.of_environment() == Place(1, 4, 1, 2)


@pytest.mark.parametrize(
    ("visible", "taken"), [(None, "1"), ("4,6", "6"), ("GPU-a,GPU-b", "GPU-b"), ("3", "3"), ("", "")]
)
def test_a_rank_sees_the_gpu_of_its_place(environment, visible, taken):
    if visible is not None:
        environment("CUDA_VISIBLE_DEVICES", visible)
    else:
        environment("CUDA_VISIBLE_DEVICES", "0")
        del os.environ["CUDA_VISIBLE_DEVICES"]
    Place(3, 4, 1, 2).take_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == taken
