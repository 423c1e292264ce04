"""A queue of jobs: whatever workers do, and whenever they die, every job is in one state and its output appears once."""

import json
import os
import random
import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ltx2_engine.nodes.runner.batch import MAX_SILENT_HOLDERS, TooManyHolders, check_holders
from ltx2_engine.nodes.runner.claim import ClaimLost, Heartbeat
from ltx2_engine.nodes.runner.job_queue import STATES, JobQueue, QueueError


@pytest.fixture
def queue(tmp_path):
    return JobQueue.create(tmp_path / "queue", expiry=60)


def write(claim, text="output"):
    (claim.work / "a").mkdir()
    (claim.work / "a" / "clip.mp4").write_text(text)


def silence(claim, seconds=61):
    """As if the holder had last renewed its claim so long ago, by the file system's clock."""
    now = claim.workflow.stat().st_mtime
    os.utime(claim.workflow, (now, now - seconds))


def begun(queue):
    claim = queue.claim()
    claim.begin()
    return claim


def states(queue):
    return {name: state for state in STATES for name in queue.names(state)}


def test_a_job_goes_from_pending_to_done_with_its_output(queue):
    job = queue.add(b"{}", "a b/../c", ["1.seed=2"])
    assert job == "00001_a-b-..-c"
    assert states(queue) == {job: "pending"}
    claim = begun(queue)
    assert claim.workflow.read_bytes() == b"{}"
    assert claim.settings() == ["1.seed=2"]
    assert states(queue) == {job: "running"}
    write(claim)
    assert list((queue.root / "done").iterdir()) == [], "nothing is seen before it is whole"
    published = claim.commit()
    assert (published / "a" / "clip.mp4").read_text() == "output"
    assert published == queue.root / "done" / job / "output"
    assert states(queue) == {job: "done"}
    assert list((queue.root / "work").iterdir()) == []
    assert queue.is_finished()
    assert queue.claim() is None


def test_jobs_are_taken_in_the_order_in_which_they_were_added(queue):
    names = [queue.add(b"{}", name) for name in ("z", "a", "m")]
    assert [queue.claim().name for _ in names] == names == ["00001_z", "00002_a", "00003_m"]


def test_a_failed_job_has_its_reason_beside_it_and_no_output(queue):
    job = queue.add(b"{}", "x")
    claim = begun(queue)
    write(claim)
    assert claim.fail("it broke").read_text() == "it broke\n"
    assert states(queue) == {job: "failed"}
    assert not (queue.root / "failed" / job / "output").exists()
    assert list((queue.root / "work").iterdir()) == []


def test_a_job_that_is_put_back_begins_anew_and_nobody_is_blamed(queue):
    queue.add(b"{}", "x")
    first = begun(queue)
    write(first, "half")
    first.put_back()
    assert list((queue.root / "work").iterdir()) == []
    second = queue.claim()
    assert second.begin() == []
    write(second, "whole")
    assert (second.commit() / "a" / "clip.mp4").read_text() == "whole"


def test_who_has_lost_a_claim_can_neither_renew_nor_publish(queue):
    job = queue.add(b"{}", "x")
    first = begun(queue)
    write(first, "first")
    silence(first)
    assert queue.expire() == [job]
    second = queue.claim()
    assert second.begin() == [first.holder]
    for act in (first.renew, first.commit, first.put_back, first.begin, lambda: first.fail("late")):
        first.work.mkdir(parents=True, exist_ok=True)  # it may still be writing
        with pytest.raises(ClaimLost, match=job):
            act()
        assert not first.work.exists()
    write(second, "second")
    assert (second.commit() / "a" / "clip.mp4").read_text() == "second"
    assert queue.claim() is None


def test_what_was_not_quite_published_is_made_again(queue):
    """The holder died between its two last renames."""
    queue.add(b"{}", "x")
    first = begun(queue)
    write(first, "first")
    os.rename(first.work, first.folder / "output")
    silence(first)
    queue.expire()
    second = begun(queue)
    assert sorted(path.name for path in second.folder.iterdir()) == ["holders.txt", "settings.json", "workflow.json"]
    write(second, "second")
    assert (second.commit() / "a" / "clip.mp4").read_text() == "second"


def test_a_claim_is_young_when_it_is_taken_and_expires_by_the_file_systems_clock(queue, monkeypatch):
    queue.add(b"{}", "x")
    waiting = queue.root / "pending" / "00001_x" / "workflow.json"
    os.utime(waiting, (0, 0))
    claim = begun(queue)
    # a machine whose clock is wrong by a day
    monkeypatch.setattr(time, "time", lambda: 86_400.0)
    assert queue.expire() == []
    silence(claim, 55)
    assert queue.expire() == []
    silence(claim, 61)
    claim.renew()
    assert queue.expire() == []
    silence(claim, 61)
    assert queue.expire() == ["00001_x"]


def test_a_job_that_comes_back_is_young_before_anybody_takes_it(queue, monkeypatch):
    """Whoever looks for it while another holder has it cannot renew it, and takes it when it is back."""
    queue.add(b"{}", "x")
    silence(begun(queue))
    assert queue.expire() == ["00001_x"]
    renew = os.utime
    monkeypatch.setattr(
        os, "utime", lambda *a: renew(*a) if "pending" not in str(a[0]) else renew(a[0].with_name("none"))
    )
    assert queue.claim() is not None
    assert queue.expire() == []


def test_a_heartbeat_keeps_a_claim_and_notices_its_loss(queue):
    queue.add(b"{}", "x")
    claim = begun(queue)
    silence(claim)
    with Heartbeat(claim, 0.01) as heartbeat:
        limit = time.monotonic() + 10
        while time.monotonic() < limit and queue._now() - claim.workflow.stat().st_mtime > 30:
            time.sleep(0.01)
        assert queue.expire() == []
        claim.put_back()
        while time.monotonic() < limit and not heartbeat.lost:
            time.sleep(0.01)
        assert heartbeat.lost


def test_a_job_that_kills_its_workers_does_not_run_for_ever(queue):
    queue.add(b"{}", "x")
    holders = []
    for _ in range(MAX_SILENT_HOLDERS):
        claim = queue.claim()
        check_holders(claim.begin())
        holders.append(claim.holder)
        silence(claim)
        queue.expire()
    with pytest.raises(TooManyHolders, match=f"3 workers went silent.*{holders[0]}"):
        check_holders(queue.claim().begin())


def test_what_dead_workers_wrote_is_removed_and_what_living_ones_write_is_not(queue):
    queue.add(b"{}", "x")
    (queue.root / "work" / "00009_gone@machine-1-aa").mkdir()
    claim = begun(queue)
    queue.expire()
    assert list((queue.root / "work").iterdir()) == [claim.work]


def test_other_names_are_none_of_ours(queue):
    for folder in (*STATES, "work"):
        for name in ("x", ".hidden", "00001_a b", "00001_x\n", "1_x", "00001_@y", "00001_x@a@b"):
            (queue.root / folder / name).mkdir()
    assert states(queue) == {}
    assert queue.claim() is None
    assert queue.expire() == []
    assert queue.is_finished()


def test_a_job_without_a_workflow_can_still_be_claimed_and_failed(queue):
    (queue.root / "pending" / "00001_x").mkdir()
    claim = begun(queue)
    assert not claim.workflow.exists()
    claim.fail("there is no workflow")
    assert states(queue) == {"00001_x": "failed"}


@pytest.mark.parametrize("text", ["{}", '"1.seed=2"', "[1]", "["])
def test_settings_of_another_form_are_refused(queue, text):
    queue.add(b"{}", "x")
    claim = begun(queue)
    (claim.folder / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"must hold a list|Expecting"):
        claim.settings()


def test_a_folder_that_is_no_queue_is_named(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(QueueError, match="not an empty folder"):
        JobQueue.create(tmp_path / "full")
    with pytest.raises(QueueError, match="is no queue"):
        JobQueue.open(tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    (tmp_path / "empty").mkdir()
    assert JobQueue.create(tmp_path / "empty").expiry == 180
    for text in ("[]", '{"expiry": "x"}', "{}", '{"expiry": 1e9}', '{"expiry": NaN}'):
        (tmp_path / "empty" / "queue.json").write_text(text)
        with pytest.raises(QueueError, match=r"queue\.json"):
            JobQueue.open(tmp_path / "empty")
    with pytest.raises(QueueError, match=r"1 to 86400 seconds; 0\.5"):
        JobQueue.create(tmp_path / "new", 0.5)


def test_who_comes_second_finds_the_queue_of_the_first(tmp_path):
    made = []
    threads = [
        threading.Thread(target=lambda n=n: made.append(JobQueue.create(tmp_path / "q", 60 + n))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_many_workers_run_every_job_once(queue):
    """Threads add, claim, give back and publish at once; one in ten dies with its claim, which another one notices."""
    committed, errors = [], []

    def add():
        for _ in range(20):
            queue.add(b"{}", "x")

    def work(seed):
        chance = random.Random(seed)
        try:
            while not queue.is_finished() or len(committed) < 60:
                queue.expire()
                claim = queue.claim()
                if claim is None:
                    time.sleep(0.001)
                    continue
                try:
                    claim.begin()
                    write(claim, claim.holder)
                    if chance.random() < 0.1:
                        silence(claim)
                        continue
                    if chance.random() < 0.1:
                        claim.put_back()
                        continue
                    if chance.random() < 0.1:
                        silence(claim)  # it sleeps for too long, and tries to publish all the same
                        time.sleep(0.002)
                    claim.commit()
                    committed.append((claim.name, claim.holder))
                except ClaimLost:
                    pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=add) for _ in range(3)]
    threads += [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert len(committed) == len(dict(committed)) == 60
    assert states(queue) == dict.fromkeys(dict(committed), "done")
    for name, holder in committed:
        assert (queue.root / "done" / name / "output" / "a" / "clip.mp4").read_text() == holder
    queue.expire()
    assert list((queue.root / "work").iterdir()) == []


class Workers(RuleBasedStateMachine):
    """Any order of what workers do, with holders that go silent and come back."""

    def __init__(self):
        super().__init__()
        import tempfile
        from pathlib import Path

        self.folder = tempfile.TemporaryDirectory()
        self.queue = JobQueue.create(Path(self.folder.name) / "q", 60)
        self.jobs, self.published, self.claims = set(), {}, []

    def teardown(self):
        self.folder.cleanup()

    @rule()
    def add(self):
        self.jobs.add(self.queue.add(b"{}", "x"))

    @rule()
    def claim(self):
        claim = self.queue.claim()
        if claim is not None:
            claim.begin()
            (claim.work / "clip").write_text(claim.holder)
            self.claims.append(claim)

    @precondition(lambda self: self.claims)
    @rule(pick=st.integers(0, 99), act=st.sampled_from(["renew", "commit", "fail", "put_back", "silence"]))
    def act(self, pick, act):
        claim = self.claims[pick % len(self.claims)]
        held = claim.folder.is_dir()
        try:
            if act == "silence":
                if held:
                    silence(claim)
            elif act == "fail":
                claim.fail("reason")
            else:
                getattr(claim, act)()
            assert held or act == "silence"
            if act == "commit":
                assert claim.name not in self.published
                self.published[claim.name] = claim.holder
        except ClaimLost:
            assert not held

    @rule()
    def expire(self):
        self.queue.expire()

    @invariant()
    def every_job_is_in_one_state(self):
        listed = [name for state in STATES for name in self.queue.names(state)]
        assert sorted(listed) == sorted(self.jobs)

    @invariant()
    def output_is_there_once_and_whole(self):
        done = {name: (self.queue.root / "done" / name / "output" / "clip") for name in self.queue.names("done")}
        assert {name: path.read_text() for name, path in done.items()} == self.published
        seen = [path.parent.parent.parent.name for path in self.queue.root.rglob("output/clip")]
        assert set(seen) <= {"done"}


TestWorkers = Workers.TestCase
TestWorkers.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_the_file_of_a_queue_is_plain(queue):
    assert json.loads((queue.root / "queue.json").read_text()) == {"expiry": 60}
