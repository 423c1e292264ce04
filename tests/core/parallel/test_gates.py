"""Gates: wherever the first rank hears of a stop, all ranks that wait for each other leave at the same place."""

import random
import threading
import time
from types import SimpleNamespace

import pytest
from ltx2_engine.ltx2_core.host import Interrupted
from ltx2_engine.ltx2_core.parallel.gates import Board, Gates
from ltx2_engine.ltx2_core.parallel.groups import Topology

BLOCKS = {0: 5, 1: 3, 2: 4, 3: 1}
EVALUATIONS = 4


def run(tmp_path, topology, job, stop_after, seed=0):
    """Every rank's last place (evaluation, block or "exchange"); None for one that came to the end.

    stop_after: how many gates rank 0 passes before it is asked to stop.
    """
    size = topology.groups * topology.ulysses
    asked = SimpleNamespace(count=0)

    def stop_asked():
        asked.count += 1
        return asked.count > stop_after

    places = {}

    def rank_run(rank):
        board = Board(tmp_path / "gates", size)
        gates = Gates(board, rank, topology, job, stop_asked if rank == 0 else lambda: True)
        hesitate = random.Random(seed + rank)
        place = None
        try:
            for evaluation in range(EVALUATIONS):
                for block in range(BLOCKS[rank // topology.ulysses]):
                    place = evaluation, block
                    gates.before_block()
                    time.sleep(hesitate.random() * 0.003)
                if topology.groups > 1:
                    place = evaluation, "exchange"
                    gates.before_exchange()
            place = None
        except Interrupted:
            pass
        places[rank] = place

    threads = [threading.Thread(target=rank_run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "a rank waits for ever"
    return places


TOPOLOGIES = [Topology(1, 2), Topology(2, 1), Topology(2, 2), Topology(4, 1)]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("stop_after", [0, 1, 5, 6, 13, 20])
def test_all_ranks_leave_at_the_same_place(tmp_path, topology, stop_after):
    places = run(tmp_path, topology, 1, stop_after)
    for group in topology.within:
        assert len({places[rank] for rank in group}) == 1, "ranks that share tokens leave at the same block"
    if places[0] is not None:
        assert {place[0] for place in places.values()} == {places[0][0]}, "and all ranks in the same evaluation"
    else:
        assert set(places.values()) == {None}


def test_without_a_stop_all_ranks_come_to_the_end_also_after_a_stopped_job(tmp_path):
    topology = Topology(2, 2)
    stopped = run(tmp_path, topology, 1, 7)
    assert None not in stopped.values()
    assert set(run(tmp_path, topology, 2, 10**6).values()) == {None}
    assert None not in run(tmp_path, topology, 3, 7).values()


def test_the_board_is_for_its_owner_alone(tmp_path):
    Board(tmp_path / "gates", 4)
    assert (tmp_path / "gates").stat().st_mode & 0o777 == 0o600


def test_leaders_are_kept_near_the_device(tmp_path):
    paced = []
    board = Board(tmp_path / "gates", 2)
    leader, other = (
        Gates(board, rank, Topology(1, 2), 1, lambda: False, lambda rank=rank: paced.append(rank)) for rank in range(2)
    )
    for gates in (leader, other):
        for _ in range(3):
            gates.before_block()
    assert paced == [0, 0, 0]
