"""Agreements: whatever goes wrong on one rank, all of them leave at the same word, and nobody waits for one that is gone."""

import threading

import pytest
from ltx2_engine.ltx2_core.fleet.agreement import Agreement
from ltx2_engine.ltx2_core.host import HostOutOfMemory, Interrupted

SIZE = 3


def outcomes(*work):
    """What each rank's ``work(agreement)`` returned or raised, and whether all can go on."""
    barrier, words, found = threading.Barrier(SIZE, timeout=10), {}, {}

    def run(rank):
        def exchange(word):
            words[rank] = word
            barrier.wait()
            heard = [words[other] for other in range(SIZE)]
            barrier.wait()
            return heard

        agreement = Agreement(exchange)
        try:
            result = work[rank](agreement)
        except BaseException as error:
            result = error
        found[rank] = result, agreement.agreed

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(SIZE)]


def failing(error):
    def work():
        raise error

    return work


def test_what_succeeds_everywhere_is_returned():
    assert outcomes(*[lambda own, n=n: own.on(lambda: n) for n in range(SIZE)]) == [(0, None), (1, None), (2, None)]
    given = [7, None, 5]
    assert outcomes(*[lambda own, n=n: own.least(n) for n in given]) == [(5, None)] * SIZE
    assert outcomes(*[lambda own: own.least(None)] * SIZE) == [(None, None)] * SIZE


@pytest.mark.parametrize("error", [HostOutOfMemory("no room for ünicode" * 100), ValueError("no"), Interrupted("stop")])
def test_what_fails_on_one_rank_ends_on_all_and_they_can_go_on(error):
    fine = lambda own: own.on(lambda: 1)  # noqa: E731
    found = outcomes(fine, lambda own: own.on(failing(error)), fine)
    assert found[1] == (error, error)
    for raised, agreed in (found[0], found[2]):
        assert isinstance(raised, Interrupted)
        assert raised is agreed
        assert "rank 1: " in str(raised)


def test_after_what_nobody_expects_they_cannot():
    fine = lambda own: own.on(lambda: 1)  # noqa: E731
    error = RuntimeError("CUDA error")
    found = outcomes(fine, fine, lambda own: own.on(failing(error)))
    assert found[2] == (error, None)
    assert [type(raised) for raised, _ in found[:2]] == [Interrupted] * 2
    assert [agreed for _, agreed in found] == [None] * SIZE


@pytest.mark.parametrize("error", [HostOutOfMemory("no room"), RuntimeError("broken")])
def test_a_rank_that_fails_before_a_number_is_asked_for_keeps_nobody_waiting(error):
    fine = lambda own: own.on(lambda: own.least(3))  # noqa: E731
    found = outcomes(lambda own: own.on(failing(error)), fine, fine)
    assert found[0][0] is error
    assert all(isinstance(raised, Interrupted) for raised, _ in found[1:])


def test_every_rank_keeps_its_own_error():
    errors = [ValueError(f"rank {rank}") for rank in range(SIZE)]
    found = outcomes(*[lambda own, error=error: own.on(failing(error)) for error in errors])
    assert found == [(error, error) for error in errors]
