"""A Ray cluster that an administrator runs, and processes of ours in it. The only file that imports Ray.

A process is an actor in a bundle of a placement group. Only text and bytes are given to actors and come from them
(`remote.py`, `remote_rank.py`). Ray pickles its own envelopes and the few lines of the actor's class, whose first call, its
constructor, places the pack.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("ltx2.ray")

LOCAL = "local"
_START_SECONDS = 300.0
PACK = Path(__file__).resolve().parents[2]


class ClusterError(RuntimeError):
    """Ray is not installed, its cluster cannot be reached, or it has not what was asked for."""


class ActorLost(RuntimeError):
    """An actor has died, or failed as nothing that it is asked can make it fail."""


@dataclass(frozen=True)
class Cluster:
    """What is asked of a cluster. address: its own, or ``local`` for one on this machine that ends with this process.

    count: how many bundles, and gpus: GPUs of each; None: as many as make sense there.
    """

    address: str
    count: int | None = None
    gpus: int | None = None

    def __post_init__(self) -> None:
        """Raises ClusterError."""
        if self.count is not None and self.count < 1:
            raise ClusterError(f"--nodes must be 1 or more, found {self.count}")
        if self.gpus is not None and self.gpus < 0:
            raise ClusterError(f"--gpus must be 0 or more, found {self.gpus}")

    @property
    def is_local(self) -> bool:
        return self.address == LOCAL


@dataclass(frozen=True)
class Bundles:
    """What is taken of a cluster: ``count`` times ``gpus`` GPUs of one machine, shared out among ``actors`` processes.

    apart: no two bundles on one machine.
    """

    count: int
    gpus: int
    actors: int = 1
    apart: bool = False

    @property
    def resources(self) -> dict[str, float]:
        """Of one bundle."""
        return {"CPU": self.actors, **({"GPU": self.gpus} if self.gpus else {})}


@contextlib.contextmanager
def connected(cluster: Cluster, processes: int) -> Iterator[Connection]:
    """A connection to a cluster; processes: how many CPUs a local one has. Raises ClusterError."""
    ray = _ray()
    more: dict[str, Any] = {"num_cpus": processes, "include_dashboard": False} if cluster.is_local else {}
    try:
        ray.init(cluster.address, log_to_driver=False, logging_level="warning", **more)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no Ray cluster at {cluster.address!r}: {error}") from error
    try:
        yield Connection(ray)
    finally:
        # with it go the placement group and the actors, which belong to this process
        ray.shutdown()


def _ray() -> Any:
    # read when Ray is imported, and handed to what it starts
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise ClusterError(
            "Ray is not installed here: pip install 'ltx2-engine[ray]'. Without it, `ltx2 batch --join DIR` on every machine "
            "shares jobs where all reach one folder, and torchrun makes one video on several machines"
        ) from error
    return ray


class Connection:
    """What a cluster has, and actors in it."""

    def __init__(self, ray: Any):
        self._ray = ray

    def gpus_of_machines(self) -> list[int]:
        """How many GPUs each machine has, in use or not."""
        return [int(node["Resources"].get("GPU", 0)) for node in self._ray.nodes() if node["Alive"]]

    def actors(self, bundles: Bundles, role: str, facts: Sequence[str]) -> Actors:
        """Actors that are all ready: bundle after bundle, one for each of ``facts``. Raises ClusterError."""
        return Actors(self._ray, bundles, role, facts)


class Actors:
    """Actors in the bundles of a placement group, known by their numbers."""

    def __init__(self, ray: Any, bundles: Bundles, role: str, facts: Sequence[str]):
        from ray.util.placement_group import placement_group

        assert len(facts) == bundles.count * bundles.actors
        self._ray, self._bundles, self._role, self._facts = ray, bundles, role, facts
        strategy = "STRICT_SPREAD" if bundles.apart else "SPREAD"
        self._group = placement_group([bundles.resources] * bundles.count, strategy=strategy)
        if not self._group.wait(_START_SECONDS):
            raise ClusterError(
                f"the cluster has no room for {bundles.count} times {bundles.resources} within {_START_SECONDS:g} s; it has "
                f"{ray.cluster_resources()}, others may use it. Ask for fewer: --nodes, --gpus"
            )
        gpus = bundles.gpus // bundles.actors
        self._actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, max_concurrency=2)(_node_class())
        self._actors = [self._start(index) for index in range(len(facts))]
        try:
            ray.get([actor.ready.remote() for actor in self._actors], timeout=_START_SECONDS)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"a worker cannot begin: {error}") from error

    def __len__(self) -> int:
        return len(self._actors)

    def ask(self, actor: int, method: str, *texts: str) -> Any:
        """What ``ended`` tells of when the actor has answered."""
        return getattr(self._actors[actor], method).remote(*texts)

    def ended(self, asked: Sequence[Any], seconds: float, count: int = 1) -> list[Any]:
        """Those that have ended, as soon as they are ``count`` or the time is over."""
        asked = list(asked)
        return self._ray.wait(asked, num_returns=min(count, len(asked)), timeout=seconds)[0] if asked else []

    def answer(self, ended: Any) -> Any:
        """What an actor has answered. Raises ActorLost."""
        try:
            return self._ray.get(ended)
        except self._ray.exceptions.RayError as error:
            # on one line: Ray's account has many
            raise ActorLost(" ".join(str(error).split())) from error

    def replace(self, actor: int) -> None:
        """Another actor in the place of one that has died."""
        self._ray.kill(self._actors[actor])
        self._actors[actor] = self._start(actor)

    def _start(self, index: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = index // self._bundles.actors
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        return self._actor.options(scheduling_strategy=place).remote(str(PACK), self._role, self._facts[index])


def _node_class() -> type:
    """The class of an actor. Defined in a function, so that Ray sends its lines: a worker cannot import the pack by name."""

    class Node:
        def __init__(self, pack: str, role: str, facts: str):
            import pathlib
            import sys
            import types

            if pathlib.Path(pack).is_dir():
                package = types.ModuleType("ltx2_engine")
                package.__path__ = [pack]
                sys.modules["ltx2_engine"] = package
            from ltx2_engine.nodes.runner.remote import RemoteNode
            from ltx2_engine.nodes.runner.remote_rank import RemoteRank

            self.worker = {"jobs": RemoteNode, "rank": RemoteRank}[role](facts)

        def ready(self) -> bool:
            return True

        def run(self, *texts: str) -> bytes:
            return self.worker.run(*texts)

        def stop(self) -> None:
            self.worker.stop()

        # of ranks only

        def meet(self, address: str) -> str:
            import ray

            return self.worker.meet(address or ray.util.get_node_ip_address())

        def told(self) -> str:
            return self.worker.told()

        def end(self) -> None:
            self.worker.end()

    return Node
