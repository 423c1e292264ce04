"""One video by ranks elsewhere: what they are told, and what becomes of their answers; the ranks here are plain objects."""

import json

import pytest
from ltx2_engine.ltx2_core.host import Interrupted
from ltx2_engine.nodes.runner import ray_video
from ltx2_engine.nodes.runner.execute import NodeFailed
from ltx2_engine.nodes.runner.options import OptionError
from ltx2_engine.nodes.runner.ray_cluster import ActorLost, Bundles, Cluster, ClusterError
from ltx2_engine.nodes.runner.remote import Answer, pack
from ltx2_engine.nodes.runner.remote_rank import RankFacts, _details
from ltx2_engine.nodes.runner.session import Folders, RunnerHost, Session, node_table
from ltx2_engine.nodes.runner.torchrun import Place
from ltx2_engine.nodes.runner.workflow import Workflow, WorkflowError

HANGS = "hangs"


class FakeActors:
    """Ranks with the answers given; ``HANGS``: none until it is told to stop, and None: none at all."""

    def __init__(self, *answers, events=(), on_wait=lambda: None):
        self.answers, self.events, self.on_wait = list(answers), list(events), on_wait
        self.told = []

    def __len__(self):
        return len(self.answers)

    def ask(self, rank, method, *texts):
        assert all(isinstance(text, str) for text in texts)
        self.told.append((rank, method))
        if method == "stop" and self.answers[rank] is HANGS:
            self.answers[rank] = pack(Answer("interrupted"), None)
        return rank, method

    def ended(self, asked, seconds, count=1):
        self.on_wait()
        return [one for one in asked if one[1] != "run" or self.answers[one[0]] not in (HANGS, None)][:count]

    def answer(self, ended):
        rank, method = ended
        if method == "meet":
            return json.dumps(["127.0.0.1", 1])
        if method == "told":
            events, self.events = self.events, []
            return json.dumps(events)
        if isinstance(self.answers[rank], Exception):
            raise self.answers[rank]
        return self.answers[rank]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that has ranks make a video, and returns its result and the events."""
    for name in ("_STOP_SECONDS", "_OTHERS_SECONDS", "_CAUSE_SECONDS"):
        monkeypatch.setattr(ray_video, name, 0.2)
    host = RunnerHost(output_dir=tmp_path / "out", progress="quiet")

    def run(actors):
        events = []
        result = ray_video.Ranks(actors, local=True).make("{}", host, lambda type, **more: events.append((type, more)))
        return result, events

    run.host = host
    return run


def saved(folder, *names):
    """Rank 0's answer with these files, one node's pictures and a text."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    entries = [
        {"filename": name.rpartition("/")[2], "subfolder": name.rpartition("/")[0], "type": "output"} for name in names
    ]
    details = {"outputs": {"1": {"text": ["seen"]}, "9": {"images": entries}}, "executed": ["1", "9"]}
    return pack(Answer("done", files=names, details=details), folder)


DONE = pack(Answer("done"), None)


def failed(error, reason="no"):
    return pack(Answer("failed", reason, details=_details(error)), None)


def test_files_are_kept_under_the_next_free_names(make, tmp_path):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub" / "a_00004_.png").write_text("mine")
    answer = saved(tmp_path / "there", "sub/a_00001_.png", "sub/a_00002_.png", "b_00001_.flac")
    result, events = make(FakeActors(answer, DONE, events=[{"type": "output", "node": "9", "path": "/there"}]))
    out = tmp_path / "out"
    assert result.files == [out / "sub" / "a_00005_.png", out / "sub" / "a_00006_.png", out / "b_00001_.flac"]
    assert [path.read_text() for path in result.files] == ["sub/a_00001_.png", "sub/a_00002_.png", "b_00001_.flac"]
    assert (out / "sub" / "a_00004_.png").read_text() == "mine"
    assert [entry["filename"] for entry in result.outputs["9"]["images"]] == [path.name for path in result.files]
    assert result.outputs["1"] == {"text": ["seen"]}
    assert result.executed == ["1", "9"]
    assert [(type, more["path"]) for type, more in events] == [("output", str(path)) for path in result.files]


def test_a_file_that_no_save_node_names_is_an_error(make, tmp_path):
    with pytest.raises(ray_video.RankFailed, match=r"rank 0 saved 'plain.png', which is no name"):
        make(FakeActors(saved(tmp_path / "there", "plain.png")))


def test_events_and_lines_of_the_log_are_told_here(make, tmp_path, caplog):
    caplog.set_level("INFO", logger="ltx2")
    told = [
        {"type": "executing", "node": "1", "class_type": "X"},
        {"type": "progress", "node": "1", "completed": 1, "total": 2},
        {"type": "log", "level": 20, "text": "100% topology"},
    ]
    _, events = make(FakeActors(saved(tmp_path / "there", "a_00001_.png"), events=told))
    assert [type for type, _ in events] == ["executing", "progress", "output"]
    assert "100% topology" in caplog.text


def test_a_dead_rank_is_named_although_another_one_failed_of_it_before(make, tmp_path):
    lost = failed(NodeFailed("7", "LTX2Sampler", None, "connection closed by peer"))
    actors = FakeActors(lost, ActorLost("worker process has died"), None)
    with pytest.raises(ray_video.RankFailed, match="rank 1: its process has ended: worker process has died"):
        make(actors)
    assert (2, "stop") in actors.told
    assert (2, "end") in actors.told
    assert (0, "end") not in actors.told


def test_the_failure_of_a_rank_is_told_and_not_that_the_others_gave_up(make):
    error = NodeFailed("7", "LTX2Sampler", "Sample", "no room")
    error.__cause__ = MemoryError()
    gave_up = pack(Answer("interrupted"), None)
    with pytest.raises(NodeFailed, match=r"node 7 \(LTX2Sampler 'Sample'\): rank 1: no room") as caught:
        make(FakeActors(gave_up, failed(error)))
    assert caught.value.cause_type == "MemoryError"
    assert caught.value.node_id == "7"


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (WorkflowError("no_prompt", "x"), WorkflowError, "^no$"),
        (OptionError("x"), OptionError, "^no$"),
        (RuntimeError("x"), ray_video.RankFailed, "^rank 0: no$"),
    ],
)
def test_other_failures_are_what_they_would_be_here(make, error, expected, message):
    with pytest.raises(expected, match=message):
        make(FakeActors(failed(error), HANGS))


def test_bytes_of_another_form_are_a_failure_of_the_rank(make):
    with pytest.raises(ray_video.RankFailed, match="rank 1: a worker answered with bytes of another form"):
        make(FakeActors(HANGS, b"?"))


def test_a_stop_is_told_to_all_and_who_does_not_hear_it_is_ended(make):
    actors = FakeActors(HANGS, None, on_wait=make.host.interrupt)
    with pytest.raises(Interrupted):
        make(actors)
    assert {(0, "stop"), (1, "stop"), (1, "end")} <= set(actors.told)
    assert (0, "end") not in actors.told


@pytest.mark.parametrize(
    ("cluster", "gpus", "bundles"),
    [
        (Cluster("a"), [0, 0], Bundles(2, 0, 1, True)),
        (Cluster("a"), [0, 4, 4], Bundles(2, 1, 1, True)),
        (Cluster("a", 2, 4), [0, 4, 8], Bundles(2, 4, 4, True)),
        (Cluster("a", 1), [1, 1], Bundles(1, 1, 1, True)),
        (Cluster("local", 2), [0], Bundles(2, 0)),
        (Cluster("local", 2, 2), [4], Bundles(2, 2, 2)),
        (Cluster("local", None, 2), [4], Bundles(1, 2, 2)),
    ],
)
def test_a_bundle_is_a_machine_with_a_process_a_gpu(cluster, gpus, bundles):
    assert ray_video._bundles(cluster, gpus) == bundles


@pytest.mark.parametrize(
    ("cluster", "gpus"), [(("a", 3), [0, 0]), (("a", 2, 4), [4, 2]), (("local", 2), [1]), (("a", None, 9), [8, 8])]
)
def test_more_than_there_is_is_an_error(cluster, gpus):
    with pytest.raises(ClusterError, match=r"machines with \d GPUs each were asked for \(--nodes, --gpus\)"):
        ray_video._bundles(Cluster(*cluster), gpus)


@pytest.mark.parametrize("numbers", [(0, None), (-1, None), (1, -1)])
def test_impossible_numbers_are_refused_before_a_cluster_is_asked(numbers):
    with pytest.raises(ClusterError, match=r"--(nodes|gpus) must be"):
        Cluster("local", *numbers)


def test_what_a_rank_is_told_survives_as_text():
    facts = RankFacts("{}", Place(3, 4, 1, 2), on_gpu=True, alone=False)
    assert RankFacts.of_text(facts.to_text()) == facts


def test_names_of_models_are_checked_here_where_the_models_are(tmp_path):
    flow = Workflow({"1": {"class_type": "LTX2LoadLora", "inputs": {}}})
    for name, refused in (("here", True), ("nowhere", False)):
        folders = Folders((tmp_path / name,))
        (tmp_path / "here").mkdir(exist_ok=True)
        session = Session(folders, node_table({}), progress="quiet")
        if refused:
            with pytest.raises(WorkflowError):
                ray_video.check_here(session, folders, flow, [])
        else:
            ray_video.check_here(session, folders, flow, [])
